// ---- Few rows: lanes are the width ----
//
// The cache is read once, as it is stored: with one to LANES / 2 rows there is nothing to share a widened copy with.

constexpr int SECOND_PART = (WIDTH + LANES - 1) / LANES * LANES;
constexpr int QUERY_STRIDE = SECOND_PART + (ROPE + LANES - 1) / LANES * LANES;

struct Few {
  alignas(64) float queries[FEW][QUERY_STRIDE];  // each part padded with zeros
  alignas(64) float scores[FEW][FEW_BLOCK], bias[FEW][FEW_BLOCK];
  alignas(64) float out[FEW][OUT_STRIDE];
  float top[FEW], total[FEW], keep[FEW];
};
static thread_local Few few_scratch;

// One step of a transposing sum: lane L gets x[L] + x[L + HALF] where bit HALF of L is clear, else y[L - HALF] + y[L].
template <int HALF, int... L>
INLINE Floats fold(Floats x, Floats y, std::integer_sequence<int, L...>) {
  const Ints stay = {(L & HALF ? LANES + L : L)...}, move = {(L & HALF ? LANES + L - HALF : L + HALF)...};
  return __builtin_shuffle(x, y, stay) + __builtin_shuffle(x, y, move);
}

// Lane i of the result is the sum over the lanes of x[i].
template <int HALF = 1>
INLINE Floats sums_of(Floats* x) {
  if constexpr (HALF == LANES) return x[0];
  else {
#pragma GCC unroll 16
    for (int i = 0; i < LANES / HALF / 2; i++)
      x[i] = fold<HALF>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, LANES>{});
    return sums_of<2 * HALF>(x);
  }
}

// sums[n · ROWS + r] += q[r] · k[n], lane by lane.
template <int ROWS, int TOKENS, int PART>
INLINE void add_dots(const float (*q)[QUERY_STRIDE], const Element* k, int64_t stride, Floats* sums) {
  const auto step = [&](int d, auto key_at) __attribute__((always_inline)) {
    Floats queries[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) queries[r] = load(q[r] + d);
#pragma GCC unroll 16
    for (int n = 0; n < TOKENS; n++) {
      const Floats key = key_at(k + n * stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sums[n * ROWS + r] += queries[r] * key;
    }
  };
#pragma GCC unroll 1
  for (int d = 0; d + LANES <= PART; d += LANES) step(d, [](const Element* p) { return load(p); });
  if constexpr (PART % LANES > 0)
    step(PART / LANES * LANES, [](const Element* p) { return load_part(p, PART % LANES); });
}

template <int ROWS, int TOKENS>
INLINE void score(const Arguments& a, const Tile& t, Few& w, int64_t first, int n) {
  Floats sums[LANES] = {};
  add_dots<ROWS, TOKENS, WIDTH>(w.queries, key_row(a, t, first + n), a.key_t, sums);
  if constexpr (ROPE > 0) {
    add_dots<ROWS, TOKENS, ROPE>((const float(*)[QUERY_STRIDE])(w.queries[0] + SECOND_PART),
                                 key_rope_row(a, t, first + n), a.key_rope_t, sums);
  }
  const Floats scores = sums_of(sums);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS * TOKENS; i++) w.scores[i % ROWS][n + i / ROWS] = scores[i];
}

// out[r][e] = out[r][e] · keep[r] + sum over n of weight[r][n] v[n][e] for VECTORS vectors of e.
template <int ROWS, int VECTORS, class Load>
INLINE void add_values(Few& w, const Element* v, int64_t stride, int count, int e, Load value_at) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) sums[r][i] = load(w.out[r] + e + i * LANES) * w.keep[r];
#pragma GCC unroll 1
  for (int n = 0; n < count; n++) {
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) {
      const Floats value = value_at(v + n * stride + e + i * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sums[r][i] += w.scores[r][n] * value;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) store(w.out[r] + e + i * LANES, sums[r][i]);
}

INLINE float largest(Floats x) {
  float y = x[0];
  for (int i = 1; i < LANES; i++) y = x[i] > y ? x[i] : y;
  return y;
}
INLINE float sum(Floats x) {
  float y = x[0];
  for (int i = 1; i < LANES; i++) y += x[i];
  return y;
}

// As for many rows, with tokens as lanes.
INLINE void weigh_row(const Arguments& a, Few& w, int r, int count, bool biased) {
  float* s = w.scores[r];
  const int padded = (count + LANES - 1) / LANES * LANES;
  for (int n = count; n < padded; n++) s[n] = 0.f;
  Floats top = splat(w.top[r]), total = {};
  for (int n = 0; n < padded; n += LANES) {
    Floats x = load(s + n);
    if constexpr (CAPPED) x = (float)a.cap * tanh_of(x * (float)(a.scale / a.cap)) * LOG2E;
    else x *= (float)a.scale * LOG2E;
    store(s + n, biased ? x + load(w.bias[r] + n) : x);
    if (n + LANES > count)
      for (int i = count; i < padded; i++) s[i] = -INFINITY;
    top = larger(load(s + n), top);
  }
  const float before = w.top[r], after = largest(top);
  for (int n = 0; n < padded; n += LANES) {
    const Floats weight = power_of_two(load(s + n) - after);
    total += weight;
    store(s + n, weight);
  }
  w.keep[r] = exp2f(before - after);
  w.top[r] = after;
  w.total[r] = w.total[r] * w.keep[r] + sum(total);
}

template <int ROWS>
static void attend_rows(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result) {
  constexpr int TOKENS = LANES / ROWS, VECTORS = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
  Few& w = few_scratch;
  for (int r = 0; r < ROWS; r++) {
    for (int d = 0; d < WIDTH; d++) w.queries[r][d] = number(query_row(a, t, r)[d]);
    for (int d = 0; d < ROPE; d++) w.queries[r][SECOND_PART + d] = number(query_rope_row(a, t, r)[d]);
    w.top[r] = LOWEST, w.total[r] = 0.f;
    std::fill_n(w.out[r], OUT_STRIDE, 0.f);
  }
  for (int64_t first = low; first < high; first += FEW_BLOCK) {
    const int count = (int)std::min<int64_t>(FEW_BLOCK, high - first);
    const Sight sight = look(a, t, first, count, skip, result.skipped, w.bias[0], [](int r, int n) {
      return r * FEW_BLOCK + n;
    });
    if (sight == Sight::NONE) continue;
    int n = 0;
    for (; n + TOKENS <= count; n += TOKENS) {
      for (int i = 0; i < TOKENS && ROWS > 1; i++) {  // one row is a stream that the hardware foresees
        if constexpr (!VALUES_ARE_KEYS) prefetch(value_row(a, t, first + n + i), VALUE_WIDTH);
        if (first + n + i + PREFETCH < high) prefetch(key_row(a, t, first + n + i + PREFETCH), WIDTH);
      }
      score<ROWS, TOKENS>(a, t, w, first, n);
    }
    for (; n < count; n++) score<ROWS, 1>(a, t, w, first, n);
    for (int r = 0; r < ROWS; r++) weigh_row(a, w, r, count, sight == Sight::SOME);
    const Element* values = value_row(a, t, first);
    const int64_t stride = VALUES_ARE_KEYS ? a.key_t : a.value_t;
    const auto whole = [](const Element* p) { return load(p); };
    int e = 0;
    for (; e + VECTORS * LANES <= VALUE_WIDTH; e += VECTORS * LANES)
      add_values<ROWS, VECTORS>(w, values, stride, count, e, whole);
    for (; e + LANES <= VALUE_WIDTH; e += LANES) add_values<ROWS, 1>(w, values, stride, count, e, whole);
    if constexpr (VALUE_WIDTH % LANES > 0)
      add_values<ROWS, 1>(w, values, stride, count, e, [](const Element* p) {
        return load_part(p, VALUE_WIDTH % LANES);
      });
  }
  for (int r = 0; r < ROWS; r++) {
    result.top[r] = w.top[r], result.total[r] = w.total[r];
    std::copy_n(w.out[r], VALUE_WIDTH, result.sum + r * OUT_STRIDE);
  }
}

template <int ROWS = FEW>
static void attend_few(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result) {
  if (t.rows == ROWS) return attend_rows<ROWS>(a, t, low, high, skip, result);
  if constexpr (ROWS > 1) attend_few<ROWS - 1>(a, t, low, high, skip, result);
}
