// ---- Products of many rows by matrix tiles (AMX) ----
//
// A tile is 16 rows of 64 bytes: C[16][16] += A[16][16 pairs] B[16 pairs][16] in one instruction. Packed keys are A of
// the scores S[n][row] as they lie, and transposed queries are B. Outputs are O[row][e]: weights are A once they are
// transposed, and values, whose pairs of tokens lie side by side, are B.

constexpr int SIDE = 16;

struct Operands {  // distances in bytes: from row to row, to the second tile, to the next 16 pairs
  const void* at;
  int64_t row, second, next;
};
struct Result {
  float* at;
  int64_t row, below, beside;  // in bytes as well
};

// Two by two tiles of C, or one of a side where A or B has one tile.
template <bool TWO_A, bool TWO_B, bool ADD>
INLINE void multiply_tiles(Operands a, Operands b, int steps, Result c) {
  asm volatile("" ::: "memory");  // loads of tiles are not known to read memory
  char *c00 = (char*)c.at, *c01 = c00 + c.beside, *c10 = c00 + c.below, *c11 = c10 + c.beside;
  if constexpr (ADD) {
    _tile_loadd(0, c00, c.row);
    if constexpr (TWO_B) _tile_loadd(1, c01, c.row);
    if constexpr (TWO_A) _tile_loadd(2, c10, c.row);
    if constexpr (TWO_A && TWO_B) _tile_loadd(3, c11, c.row);
  } else {
    _tile_zero(0);
    if constexpr (TWO_B) _tile_zero(1);
    if constexpr (TWO_A) _tile_zero(2);
    if constexpr (TWO_A && TWO_B) _tile_zero(3);
  }
  const char *left = (const char*)a.at, *right = (const char*)b.at;
#pragma GCC unroll 1
  for (int k = 0; k < steps; k++, left += a.next, right += b.next) {
    _tile_loadd(4, left, a.row);
    _tile_loadd(6, right, b.row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_B) {
      _tile_loadd(7, right + b.second, b.row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TWO_A) {
      _tile_loadd(5, left + a.second, a.row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (TWO_A && TWO_B) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c00, c.row);
  if constexpr (TWO_B) _tile_stored(1, c01, c.row);
  if constexpr (TWO_A) _tile_stored(2, c10, c.row);
  if constexpr (TWO_A && TWO_B) _tile_stored(3, c11, c.row);
}

// The pairs of weights of a row side by side, zeros behind the last.
template <int VECTORS>
INLINE void transpose_weights(const Rows& w, int count, uint32_t (*by_row)[VALUE_STEPS]) {
  const int pairs = (count + 1) / 2;
  for (int r = 0; r < VECTORS * LANES; r++) {
    for (int n = 0; n < pairs; n++) by_row[r][n] = w.weights[n][r];
    for (int n = pairs; n < VALUE_STEPS; n++) by_row[r][n] = 0;
  }
}

template <int VECTORS>
static void attend_group(const Arguments& a, const Tile& t, Rows& w, int group, int64_t first, int count, int64_t end,
                         bool biased) {
  constexpr bool TWO = VECTORS == 2;
  constexpr int64_t PAIR = sizeof(Operand), FLOAT = sizeof(float);
  for (int n = 0; n < count; n += 2 * SIDE)
    multiply_tiles<true, TWO, false>(
        {w.keys + n * KEY_STRIDE, KEY_STRIDE * PAIR, SIDE * KEY_STRIDE * PAIR, SIDE * PAIR},
        {w.queries[group], GROUP * PAIR, SIDE * PAIR, SIDE * GROUP * PAIR}, QUERY_STEPS / SIDE,
        {w.scores[n], GROUP * FLOAT, SIDE * GROUP * FLOAT, SIDE * FLOAT});
  weigh<VECTORS>(a, w, group, count, biased);

  alignas(64) uint32_t weights[VECTORS * LANES][VALUE_STEPS];
  transpose_weights<VECTORS>(w, count, weights);
  for (int r = 0; r < VECTORS * LANES; r++) {
    if (w.keep[r] == 1.f) continue;
    float* out = w.out[group] + r * OUT_ROWS;
    for (int e = 0; e < OUT_ROWS; e += LANES) store(out + e, load(out + e) * w.keep[r]);
  }
  Ahead ahead{a, t, group == 0 ? first + BLOCK : end, std::min(end, first + 2 * BLOCK)};
  for (int e = 0; e < OUT_ROWS; e += 2 * SIDE) {
    ahead.fetch((BLOCK * Ahead::LINES * 2 * SIDE + OUT_ROWS - 1) / OUT_ROWS);
    multiply_tiles<TWO, true, true>({weights, VALUE_STEPS * PAIR, SIDE * VALUE_STEPS * PAIR, SIDE * PAIR},
                                    {w.values + e, VALUE_STRIDE * PAIR, SIDE * PAIR, SIDE * VALUE_STRIDE * PAIR},
                                    VALUE_STEPS / SIDE,
                                    {w.out[group] + e, OUT_ROWS * FLOAT, SIDE * OUT_ROWS * FLOAT, SIDE * FLOAT});
  }
}

INLINE float out_at(const Rows& w, int row, int e) { return w.out[row / GROUP][row % GROUP * OUT_ROWS + column(e)]; }

// All eight tiles have 16 rows of 64 bytes.
INLINE void begin_products() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  _tile_loadconfig(&shape);
}
INLINE void end_products() { _tile_release(); }
