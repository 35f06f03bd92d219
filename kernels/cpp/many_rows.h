// ---- Many rows: lanes are rows ----
//
// Queries are transposed once per tile, keys and values are widened once per block. Then scores S[n][row] and outputs
// O[e][row] are the same product, a scalar of the cache times a vector of rows, and the softmax needs no sum over lanes.

constexpr int GROUP = 2 * LANES;  // rows that go through the products together

INLINE Floats add_product(Floats sum, Floats x, Floats y) { return sum + x * y; }

// Pairs of bfloat16: sum + x_low · y_low + x_high · y_high.
INLINE Floats add_product(Floats sum, Words x, Words y) {
#if defined(__AVX512BF16__) && defined(INTRINSICS)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  sum += (Floats)(x << 16) * (Floats)(y << 16);
  return sum + (Floats)(x & 0xffff0000) * (Floats)(y & 0xffff0000);
#endif
}

struct Rows {
  alignas(64) Operand queries[TILE / GROUP][KEY_STEPS][GROUP];
  alignas(64) Operand keys[BLOCK * KEY_STRIDE];
  alignas(64) Operand values[VALUES_ARE_KEYS && !BF16_DOT ? 1 : VALUE_STEPS * VALUE_STRIDE];
  alignas(64) float scores[BLOCK][GROUP];
  alignas(64) Operand weights[VALUE_STEPS][GROUP];
  alignas(64) float bias[TILE / GROUP][BLOCK][GROUP];
  alignas(64) float out[TILE / GROUP][OUT_ROWS][GROUP];
  alignas(64) float top[TILE], total[TILE], keep[GROUP];
};
static thread_local Rows rows_scratch;

// C[i][row] = start(i, v) + sum over k of A[i · A_I + k · A_K] B[k][row], where `start` gives vector v of row i.
template <int I, int VECTORS, int A_I, int A_K, class Start>
INLINE void add_products(const Operand* a, const Operand (*b)[GROUP], int steps, float (*c)[GROUP], Start start) {
  Floats sums[I][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) sums[i][v] = Floats{};
#pragma GCC unroll 1
  for (int k = 0; k < steps; k++) {
#pragma GCC unroll 16
    for (int i = 0; i < I; i++) {
      const auto x = splat(a[i * A_I + k * A_K]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) sums[i][v] = add_product(sums[i][v], x, load(b[k] + v * LANES));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) store(c[i] + v * LANES, start(i, v) + sums[i][v]);
}

INLINE void copy_widened(const Element* from, float* to, int width) {
  int d = 0;
  for (; d + LANES <= width; d += LANES) store(to + d, load(from + d));
  for (; d < width; d++) to[d] = number(from[d]);
}

static void pack(const Arguments& a, const Tile& t, int64_t first, int count, Rows& w) {
  const int padded = (count + I_OF_ONE - 1) / I_OF_ONE * I_OF_ONE;  // rows of zeros to the next multiple
  std::memset(w.keys + count * KEY_STRIDE, 0, (padded - count) * KEY_STRIDE * sizeof(Operand));
  for (int n = 0; n < count; n++) {
    Operand* keys = w.keys + n * KEY_STRIDE;
    if constexpr (BF16_DOT) {
      std::memcpy(keys, key_row(a, t, first + n), WIDTH * sizeof(Element));
      if constexpr (ROPE > 0)
        std::memcpy(keys + WIDTH / 2, key_rope_row(a, t, first + n), ROPE * sizeof(Element));
    } else {
      copy_widened(key_row(a, t, first + n), (float*)keys, WIDTH);
      if constexpr (ROPE > 0) copy_widened(key_rope_row(a, t, first + n), (float*)keys + WIDTH, ROPE);
      if constexpr (!VALUES_ARE_KEYS)
        copy_widened(value_row(a, t, first + n), (float*)w.values + n * VALUE_STRIDE, VALUE_WIDTH);
    }
  }
  if constexpr (BF16_DOT)  // pairs of tokens; the last of an odd count is paired with zeros
    for (int n = 0; n < count; n += 2) {
      const uint16_t* even = (const uint16_t*)value_row(a, t, first + n);
      const uint16_t* odd = n + 1 < count ? (const uint16_t*)value_row(a, t, first + n + 1) : nullptr;
      uint32_t* pairs = (uint32_t*)w.values + n / 2 * VALUE_STRIDE;
      int e = 0;
      for (; e + LANES <= VALUE_WIDTH; e += LANES)
        store(pairs + e, load_bits(even + e) | (odd ? load_bits(odd + e) << 16 : Words{}));
      for (; e < VALUE_WIDTH; e++) pairs[e] = even[e] | (odd ? (uint32_t)odd[e] << 16 : 0);
    }
}

static void transpose_queries(const Arguments& a, const Tile& t, Rows& w) {
  for (int r = 0; r < t.rows; r++) {
    const Element *first = query_row(a, t, r), *second = ROPE > 0 ? query_rope_row(a, t, r) : nullptr;
    for (int k = 0; k < KEY_STEPS; k++) {
      Operand& q = w.queries[r / GROUP][k][r % GROUP];
      const Element* at = k < WIDTH / STEP ? first + k * STEP : second + (k - WIDTH / STEP) * STEP;
      if constexpr (BF16_DOT) std::memcpy(&q, at, sizeof q);
      else q = number(*at);
    }
  }
}

// Two weights of a row as a pair of bfloat16.
INLINE Words pair(Floats even, Floats odd) {
  const Words x = (Words)even, y = (Words)odd;
  return (x + 0x7fff + (x >> 16 & 1)) >> 16 | ((y + 0x7fff + (y >> 16 & 1)) & 0xffff0000);
}

// Scores become weights 2^(score - top); what was summed before is worth keep = 2^(old top - new top).
template <int VECTORS>
INLINE void weigh(const Arguments& a, Rows& w, int group, int count, bool biased) {
  for (int v = 0; v < VECTORS; v++) {
    const int at = v * LANES;
    float factor = (float)a.scale * LOG2E;
    if constexpr (CAPPED) {
      const float inner = (float)(a.scale / a.cap), outer = (float)a.cap;
      factor = LOG2E;
      for (int n = 0; n < count; n++) store(w.scores[n] + at, outer * tanh_of(load(w.scores[n] + at) * inner));
    }
    const auto score = [&](int n) {
      const Floats s = load(w.scores[n] + at) * factor;
      return biased ? s + load(w.bias[group][n] + at) : s;
    };
    const Floats before = load(w.top + group * GROUP + at);
    Floats top = before, total = {};
    for (int n = 0; n < count; n++) top = larger(score(n), top);
    for (int n = 0; n < count; n += STEP) {
      const Floats weight = power_of_two(score(n) - top);
      total += weight;
      if constexpr (BF16_DOT) {
        const Floats next = n + 1 < count ? power_of_two(score(n + 1) - top) : Floats{};
        total += next;
        store((uint32_t*)w.weights[n / STEP] + at, pair(weight, next));
      } else {
        store((float*)w.weights[n] + at, weight);
      }
    }
    const Floats keep = power_of_two(before - top);
    store(w.keep + at, keep);
    store(w.top + group * GROUP + at, top);
    store(w.total + group * GROUP + at, load(w.total + group * GROUP + at) * keep + total);
  }
}

template <int VECTORS>
static void attend_group(const Arguments& a, const Tile& t, Rows& w, int group, int64_t first, int count, int64_t end,
                         bool biased) {
  constexpr int I = VECTORS == 1 ? I_OF_ONE : I_OF_TWO;
  for (int k = 0; k < KEY_STEPS; k += STEPS_IN_L1)
    for (int n = 0; n < count; n += I) {
      if (group == 0 && k == 0)
        for (int64_t j = first + BLOCK + n; j < std::min(end, first + BLOCK + n + I); j++) prefetch_token(a, t, j);
      const auto start = [&](int i, int v) { return k ? load(w.scores[n + i] + v * LANES) : Floats{}; };
      add_products<I, VECTORS, KEY_STRIDE, 1>(w.keys + n * KEY_STRIDE + k, w.queries[group] + k,
                                              std::min(STEPS_IN_L1, KEY_STEPS - k), w.scores + n, start);
    }
  weigh<VECTORS>(a, w, group, count, biased);
  const Operand* values = VALUES_ARE_KEYS && !BF16_DOT ? w.keys : w.values;
  for (int e = 0; e < VALUE_WIDTH; e += I) {
    float(*out)[GROUP] = w.out[group] + e;
    const auto start = [&](int i, int v) { return load(out[i] + v * LANES) * load(w.keep + v * LANES); };
    add_products<I, VECTORS, 1, VALUE_STRIDE>(values + e, w.weights, (count + STEP - 1) / STEP, out, start);
  }
}

static void attend_many(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result) {
  Rows& w = rows_scratch;
  const int vectors = (t.rows + LANES - 1) / LANES, groups = (vectors + 1) / 2;
  transpose_queries(a, t, w);
  std::memset(w.out, 0, groups * sizeof w.out[0]);
  std::fill_n(w.top, groups * GROUP, LOWEST);
  std::fill_n(w.total, groups * GROUP, 0.f);
  const auto place = [](int r, int n) { return (r / GROUP * BLOCK + n) * GROUP + r % GROUP; };
  for (int64_t first = low; first < high; first += BLOCK) {
    const int count = (int)std::min<int64_t>(BLOCK, high - first);
    const Sight sight = look(a, t, first, count, skip, result.skipped, w.bias[0][0], place);
    if (sight == Sight::NONE) continue;
    pack(a, t, first, count, w);
    for (int g = 0; g < groups; g++)
      (2 * g + 1 < vectors ? attend_group<2> : attend_group<1>)(a, t, w, g, first, count, high, sight == Sight::SOME);
  }
  std::copy_n(w.top, t.rows, result.top);
  std::copy_n(w.total, t.rows, result.total);
  for (int g = 0; g < groups; g++)
    for (int r = g * GROUP; r < std::min((g + 1) * GROUP, t.rows); r++)
      for (int e = 0; e < VALUE_WIDTH; e++) result.sum[r * OUT_STRIDE + e] = w.out[g][e][r % GROUP];
}
