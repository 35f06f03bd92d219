// ---- Products of many rows by vectors ----
//
// Scores S[n][row] and outputs O[e][row] are the same product: a scalar of the cache times a vector of rows.

constexpr int STRETCH = 16;  // steps of a product between prefetches

// C[i][row] = start(i, v) + sum over k of A[i · A_I + k · A_K] B[k][row], where `start` gives vector v of row i.
// `between` is called after every STRETCH steps: what it prefetches arrives while products are made.
template <int I, int VECTORS, int A_I, int A_K, class Start, class Between>
INLINE void add_products(const Operand* a, const Operand (*b)[GROUP], int steps, float (*c)[GROUP], Start start,
                         Between between) {
  Floats sums[I][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) sums[i][v] = Floats{};
#pragma GCC unroll 1
  for (int begin = 0; begin < steps; begin += STRETCH) {
    const int end = std::min(begin + STRETCH, steps);
#pragma GCC unroll 1
    for (int k = begin; k < end; k++) {
#pragma GCC unroll 16
      for (int i = 0; i < I; i++) {
        const auto x = splat(a[i * A_I + k * A_K]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[i][v] = add_product(sums[i][v], x, load(b[k] + v * LANES));
      }
    }
    between();
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) store(c[i] + v * LANES, start(i, v) + sums[i][v]);
}

template <int VECTORS>
static void attend_group(const Arguments& a, const Tile& t, Rows& w, int group, int64_t first, int count, int64_t end,
                         bool biased) {
  constexpr int I = VECTORS == 1 ? I_OF_ONE : I_OF_TWO;
  constexpr int CALLS = BLOCK / I * (KEY_STEPS / STRETCH) + COLUMNS / I * ((VALUE_STEPS + STRETCH - 1) / STRETCH);
  Ahead ahead{a, t, group == 0 ? first + BLOCK : end, std::min(end, first + 2 * BLOCK)};
  const auto fetch = [&]() __attribute__((always_inline)) { ahead.fetch(BLOCK * Ahead::LINES / (CALLS + 1) + 1); };
  for (int k = 0; k < KEY_STEPS; k += STEPS_IN_L1)
    for (int n = 0; n < count; n += I) {
      const auto start = [&](int i, int v) { return k ? load(w.scores[n + i] + v * LANES) : Floats{}; };
      add_products<I, VECTORS, KEY_STRIDE, 1>(w.keys + n * KEY_STRIDE + k, w.queries[group] + k,
                                              std::min(STEPS_IN_L1, KEY_STEPS - k), w.scores + n, start, fetch);
    }
  weigh<VECTORS>(a, w, group, count, biased);
  const Operand* values = VALUES_ARE_KEYS && !BF16_DOT ? w.keys : w.values;
  for (int e = 0; e < COLUMNS; e += I) {
    float(*out)[GROUP] = (float(*)[GROUP])w.out[group] + e;
    const auto start = [&](int i, int v) { return load(out[i] + v * LANES) * load(w.keep + v * LANES); };
    add_products<I, VECTORS, 1, VALUE_STRIDE>(values + e, w.weights, (count + STEP - 1) / STEP, out, start, fetch);
  }
}

INLINE float out_at(const Rows& w, int row, int e) { return w.out[row / GROUP][column(e) * GROUP + row % GROUP]; }
INLINE void begin_products() {}
INLINE void end_products() {}
