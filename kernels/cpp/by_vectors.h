// ---- Products of many rows by vectors ----
//
// Scores S[n][row] and outputs O[e][row] are the same product: a scalar of the cache times a vector of rows.

constexpr int STRETCH = 16;  // steps of a product between prefetches from memory: a cache line of a row
constexpr int SOON = 8;      // tokens ahead that come into the first cache

// C[i][row] = start(i, v) + sum over k of A[i · A_I + k · A_K] B[k][row], where `start` gives vector v of row i.
// `between` is called after every STRETCH steps: what it prefetches arrives while products are made.
template <int I, int VECTORS, int A_I, int A_K, class Start, class Between>
INLINE void add_products(const Operand* a, const Operand* b, int steps, float* c, Start start, Between between) {
  constexpr int LINE = VECTORS * LANES;
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
      __builtin_prefetch(A_K == 1 ? a + (k - begin) * A_I + end : a + (k + SOON) * A_K);
#pragma GCC unroll 16
      for (int i = 0; i < I; i++) {
        const auto x = splat(a[i * A_I + k * A_K]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[i][v] = add_product(sums[i][v], x, load(b + k * LINE + v * LANES));
      }
    }
    between();
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) store(c + i * LINE + v * LANES, start(i, v) + sums[i][v]);
}

// Floats are operands as they lie in the cache, where tokens lie side by side and columns fill whole register tiles.
constexpr bool FLOATS = std::is_same_v<Element, float> && BLOCK % I_OF_ONE == 0 && VALUE_WIDTH % I_OF_ONE == 0;
INLINE bool reads_cache(const Arguments& a, int vectors) {
  return FLOATS && vectors == 1 && a.key_t == WIDTH && (ROPE == 0 || a.key_rope_t == ROPE) &&
         (VALUES_ARE_KEYS || a.value_t == VALUE_WIDTH);
}

template <int VECTORS>
static void attend_group(const Arguments& a, const Tile& t, Rows& w, int group, int64_t first, int count, int64_t end,
                         bool biased, bool packed) {
  constexpr int I = VECTORS == 1 ? I_OF_ONE : I_OF_TWO, LINE = VECTORS * LANES;
  constexpr int CALLS = BLOCK / I * (KEY_STEPS / STRETCH) + COLUMNS / I * ((VALUE_STEPS + STRETCH - 1) / STRETCH);
  Ahead ahead{a, t, group == 0 ? first + BLOCK : end, std::min(end, first + 2 * BLOCK)};
  const auto fetch = [&]() __attribute__((always_inline)) { ahead.fetch(BLOCK * Ahead::LINES / (CALLS + 1) + 1); };
  const auto score = [&](auto stride, const Operand* keys, int from, int to) __attribute__((always_inline)) {
    for (int k = from; k < to; k += STEPS_IN_L1)
      for (int n = 0; n < count; n += I) {
        const auto start = [&](int i, int v) { return k ? load(w.scores + (n + i) * LINE + v * LANES) : Floats{}; };
        add_products<I, VECTORS, stride(), 1>(keys + n * stride() + k - from, w.queries[group] + k * LINE,
                                              std::min(STEPS_IN_L1, to - k), w.scores + n * LINE, start, fetch);
      }
  };
  const auto add_values = [&](auto stride, const Operand* values) __attribute__((always_inline)) {
    for (int e = 0; e < COLUMNS; e += I) {
      float* out = w.out[group] + e * LINE;
      const auto start = [&](int i, int v) { return load(out + i * LINE + v * LANES) * load(w.keep + v * LANES); };
      add_products<I, VECTORS, 1, stride()>(values + e, w.weights, (count + STEP - 1) / STEP, out, start, fetch);
    }
  };
  constexpr std::integral_constant<int, KEY_STRIDE> packed_key;
  constexpr std::integral_constant<int, VALUE_STRIDE> packed_value;
  constexpr std::integral_constant<int, WIDTH> key;
  constexpr std::integral_constant<int, ROPE> rope;
  constexpr std::integral_constant<int, VALUE_WIDTH> value;
  if constexpr (FLOATS && VECTORS == 1) {
    if (!packed) {
      score(key, key_row(a, t, first), 0, WIDTH);
      if constexpr (ROPE > 0) score(rope, key_rope_row(a, t, first), WIDTH, WIDTH + ROPE);
      weigh<VECTORS>(a, w, group, count, biased);
      add_values(value, value_row(a, t, first));
      return;
    }
  }
  score(packed_key, w.keys, 0, KEY_STEPS);
  weigh<VECTORS>(a, w, group, count, biased);
  add_values(packed_value, VALUES_ARE_KEYS && !BF16_DOT ? w.keys : w.values);
}

INLINE void write_sums(const Rows& w, int rows, float* sum) {
  for (int r = 0; r < rows; r += LANES) {
    const int line = line_of((rows + LANES - 1) / LANES, r / GROUP);
    for (int e = 0; e < VALUE_WIDTH; e += LANES) {
      Floats square[LANES];
      for (int i = 0; i < LANES; i++)
        square[i] = e + i < VALUE_WIDTH ? load(w.out[r / GROUP] + column(e + i) * line + r % GROUP) : Floats{};
      transpose(square);
      for (int i = 0; i < std::min(LANES, rows - r); i++) store(sum + (r + i) * OUT_STRIDE + e, square[i]);
    }
  }
}
INLINE void begin_products() {}
INLINE void end_products() {}
