// ---- Products of many rows by matrix tiles (AMX) ----
//
// A tile is 16 rows of 64 bytes: C[16][16] += A[16][16 pairs] B[16 pairs][16] in one instruction. Packed keys are A of
// the scores S[n][row] as they lie, and transposed queries are B. Outputs are O[row][e]: weights are A once they are
// transposed, and values, whose pairs of tokens lie side by side, are B.

constexpr int SIDE = 16;
constexpr int FETCHED = 16;  // cache lines between products

struct Operands {  // distances in bytes: from row to row, to the second tile, to the next 16 pairs
  const void* at;
  int64_t row, second, next;
};
struct Result {
  float* at;
  int64_t row, below, beside;  // in bytes as well
};

// Two by two tiles of C, or one of a side where A or B has one tile. What is fetched ahead comes between the products.
template <bool TWO_A, bool TWO_B, bool ADD>
INLINE void multiply_tiles(Operands a, Operands b, int steps, Result c, Ahead& ahead) {
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
    ahead.fetch(FETCHED);
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
  for (int r = 0; r < VECTORS * LANES; r += LANES)
    for (int n = 0; n < VALUE_STEPS; n += LANES) {
      Words square[LANES];
      for (int i = 0; i < LANES; i++)
        square[i] = n + i < pairs ? load(w.weights + (n + i) * VECTORS * LANES + r) : Words{};
      transpose(square);
      for (int i = 0; i < LANES; i++) store(by_row[r + i] + n, square[i]);
    }
}

// Latents of a whole block as they lie in the cache. As keys they are A of the scores. As values a token is a row of B
// for two products: by weights whose partner in the pair is zero, which give the even and the odd columns.
INLINE bool reads_cache(const Arguments&, int vectors) {
  return VALUES_ARE_KEYS && WIDTH % 64 == 0 && ROPE % 32 == 0 && vectors <= 2;
}

template <int VECTORS>
INLINE void score_cache(const Arguments& a, const Tile& t, Rows& w, int64_t first, Ahead& ahead) {
  constexpr bool TWO = VECTORS == 2;
  constexpr int64_t LINE = VECTORS * LANES, FLOAT = sizeof(float), BYTES = sizeof(Element);
  constexpr int64_t QUERY = LINE * sizeof(Operand);
  for (int n = 0; n < BLOCK; n += 2 * SIDE) {
    const Result scores{w.scores + n * LINE, LINE * FLOAT, SIDE * LINE * FLOAT, SIDE * FLOAT};
    multiply_tiles<true, TWO, false>({key_row(a, t, first + n), a.key_t * BYTES, SIDE * a.key_t * BYTES, 64},
                                     {w.queries[0], QUERY, 64, SIDE * QUERY}, WIDTH / 32, scores, ahead);
    if constexpr (ROPE > 0)
      multiply_tiles<true, TWO, true>(
          {key_rope_row(a, t, first + n), a.key_rope_t * BYTES, SIDE * a.key_rope_t * BYTES, 64},
          {w.queries[0] + WIDTH / STEP * LINE, QUERY, 64, SIDE * QUERY}, ROPE / 32, scores, ahead);
  }
}

template <int VECTORS>
INLINE void add_cache(const Arguments& a, const Tile& t, Rows& w, int64_t first, const uint32_t (*weights)[VALUE_STEPS],
                      Ahead& ahead) {
  constexpr int64_t FLOAT = sizeof(float);
  const int64_t token = a.key_t * sizeof(Element);
  alignas(64) uint32_t halves[2][SIDE][BLOCK];
  for (int v = 0; v < VECTORS; v++) {
    for (int r = 0; r < SIDE; r++)
      for (int n = 0; n < BLOCK; n += LANES) {
        const Words weight = load_bits((const uint16_t*)weights[v * SIDE + r] + n);
        store(halves[0][r] + n, weight);
        store(halves[1][r] + n, weight << 16);
      }
    for (int e = 0; e < WIDTH; e += 4 * SIDE)
      multiply_tiles<true, true, true>(
          {halves, BLOCK * FLOAT, SIDE * BLOCK * FLOAT, 64}, {key_row(a, t, first) + e, token, 64, SIDE * token},
          BLOCK / SIDE, {w.out[0] + v * SIDE * OUT_ROWS + e, OUT_ROWS * FLOAT, SIDE * FLOAT, 2 * SIDE * FLOAT}, ahead);
  }
}

template <int VECTORS>
static void attend_group(const Arguments& a, const Tile& t, Rows& w, int group, int64_t first, int count, int64_t end,
                         bool biased, bool packed) {
  constexpr bool TWO = VECTORS == 2;
  constexpr int64_t LINE = VECTORS * LANES, PAIR = sizeof(Operand), FLOAT = sizeof(float);
  Ahead ahead{a, t, group == 0 ? first + BLOCK : end, std::min(end, first + 2 * BLOCK)};
  if (!packed) {
    score_cache<VECTORS>(a, t, w, first, ahead);
  } else {
    for (int n = 0; n < count; n += 2 * SIDE)
      multiply_tiles<true, TWO, false>(
          {w.keys + n * KEY_STRIDE, KEY_STRIDE * PAIR, SIDE * KEY_STRIDE * PAIR, SIDE * PAIR},
          {w.queries[group], LINE * PAIR, SIDE * PAIR, SIDE * LINE * PAIR}, QUERY_STEPS / SIDE,
          {w.scores + n * LINE, LINE * FLOAT, SIDE * LINE * FLOAT, SIDE * FLOAT}, ahead);
  }
  weigh<VECTORS>(a, w, group, count, biased);

  alignas(64) uint32_t weights[VECTORS * LANES][VALUE_STEPS];
  transpose_weights<VECTORS>(w, count, weights);
  for (int r = 0; r < VECTORS * LANES; r++) {
    if (w.keep[r] == 1.f) continue;
    float* out = w.out[group] + r * OUT_ROWS;
    for (int e = 0; e < OUT_ROWS; e += LANES) store(out + e, load(out + e) * w.keep[r]);
  }
  if (!packed) {
    add_cache<VECTORS>(a, t, w, first, weights, ahead);
  } else {
    for (int e = 0; e < OUT_ROWS; e += 2 * SIDE)
      multiply_tiles<TWO, true, true>({weights, VALUE_STEPS * PAIR, SIDE * VALUE_STEPS * PAIR, SIDE * PAIR},
                                      {w.values + e, VALUE_STRIDE * PAIR, SIDE * PAIR, SIDE * VALUE_STRIDE * PAIR},
                                      VALUE_STEPS / SIDE,
                                      {w.out[group] + e, OUT_ROWS * FLOAT, SIDE * OUT_ROWS * FLOAT, SIDE * FLOAT},
                                      ahead);
  }
  ahead.fetch(BLOCK * Ahead::LINES);  // what is left
}

// Columns in the order of `column` become those of the values.
INLINE void write_sums(const Rows& w, int rows, float* sum) {
  for (int r = 0; r < rows; r++) {
    const float* out = w.out[r / GROUP] + r % GROUP * OUT_ROWS;
    int e = 0;
    for (; e + 2 * LANES <= VALUE_WIDTH; e += 2 * LANES) {
      const Floats even = load(out + e), odd = load(out + e + LANES);
      float* at = sum + r * OUT_STRIDE + e;
      store(at, SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
      store(at + LANES, SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
    for (; e < VALUE_WIDTH; e++) sum[r * OUT_STRIDE + e] = out[column(e)];
  }
}

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
