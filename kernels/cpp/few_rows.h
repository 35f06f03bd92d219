// ---- Few rows: lanes are the width ----
//
// The cache is read once, as it is stored: with one to LANES / 2 rows there is nothing to share a widened copy with.
// Pairs of bfloat16 are multiplied as pairs by the queries; as values they become a vector of even and one of odd ones.

constexpr int operands(int width) { return (width + STEP - 1) / STEP; }
constexpr int SECOND_PART = (operands(WIDTH) + LANES - 1) / LANES * LANES;
constexpr int QUERY_STRIDE = SECOND_PART + (operands(ROPE) + LANES - 1) / LANES * LANES;
constexpr int FEW_COLUMNS = (VALUE_WIDTH + UNIT - 1) / UNIT * UNIT;

struct Few {
  alignas(64) Operand queries[FEW][QUERY_STRIDE];  // each part padded with zeros
  alignas(64) float scores[FEW][FEW_BLOCK], bias[FEW][FEW_BLOCK];
  alignas(64) float out[FEW][FEW_COLUMNS];  // in the order of `column`
  float top[FEW], total[FEW], keep[FEW];
};

// sums[r · ALL + n] += q[r] · k[n], lane by lane. A stride that is a constant leaves one address to count with.
template <int ROWS, int TOKENS, int ALL, int PART, class Stride>
INLINE void add_dots(const Operand (*q)[QUERY_STRIDE], const Element* k, Stride stride, Floats* sums) {
  const auto step = [&](int d, auto key_at) __attribute__((always_inline)) {
    Loaded queries[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) queries[r] = load(q[r] + d / STEP);
#pragma GCC unroll 16
    for (int n = 0; n < TOKENS; n++) {
      const Loaded key = key_at(k + n * stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sums[r * ALL + n] = add_product(sums[r * ALL + n], queries[r], key);
    }
  };
#pragma GCC unroll 4
  for (int d = 0; d + UNIT <= PART; d += UNIT) step(d, [](const Element* p) { return loaded(p); });
  if constexpr (PART % UNIT > 0)
    step(PART / UNIT * UNIT, [](const Element* p) { return loaded(p, PART % UNIT); });
}

template <int ROWS, int TOKENS, class Stride>
INLINE void score(const Arguments& a, const Tile& t, Few& w, int64_t first, int n, Stride stride) {
  constexpr int TOGETHER = std::max(1, std::min(TOKENS, LANES / 2 / ROWS));  // as many sums as fit in registers
  constexpr int REST = TOKENS % TOGETHER, WHOLE = TOKENS - REST;
  const Element* keys = key_row(a, t, first + n);
  Floats sums[LANES] = {};
#pragma GCC unroll 16
  for (int m = 0; m < WHOLE; m += TOGETHER)
    add_dots<ROWS, TOGETHER, TOKENS, WIDTH>(w.queries, keys + m * stride, stride, sums + m);
  if constexpr (REST > 0)
    add_dots<ROWS, REST, TOKENS, WIDTH>(w.queries, keys + WHOLE * stride, stride, sums + WHOLE);
  if constexpr (ROPE > 0)
    add_dots<ROWS, TOKENS, TOKENS, ROPE>((const Operand(*)[QUERY_STRIDE])(w.queries[0] + SECOND_PART),
                                         key_rope_row(a, t, first + n), a.key_rope_t, sums);
  alignas(64) float scores[LANES];
  store(scores, sums_of(sums));
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) std::memcpy(w.scores[r] + n, scores + r * TOKENS, TOKENS * sizeof(float));
}

// out[r][e] = out[r][e] · keep[r] + sum over n of weight[r][n] v[n][e] for UNITS vectors of operands from e on.
template <int ROWS, int UNITS, class Stride, class Load, class Fetch>
INLINE void add_values(Few& w, const Element* v, Stride stride, int count, int e, Load values_at, Fetch fetch) {
  Floats sums[ROWS][UNITS * STEP];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int i = 0; i < UNITS * STEP; i++) sums[r][i] = load(w.out[r] + e + i * LANES) * w.keep[r];
#pragma GCC unroll 1
  for (int n = 0; n < count; n++) {
    fetch(n);
#pragma GCC unroll 16
    for (int i = 0; i < UNITS; i++) {
      const Loaded value = values_at(v + n * stride + e + i * UNIT);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        if constexpr (BF16_DOT) {
          sums[r][2 * i] += w.scores[r][n] * (Floats)((Words)value << 16);
          sums[r][2 * i + 1] += w.scores[r][n] * (Floats)((Words)value & 0xffff0000);
        } else {
          sums[r][i] += w.scores[r][n] * (Floats)value;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int i = 0; i < UNITS * STEP; i++) store(w.out[r] + e + i * LANES, sums[r][i]);
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
INLINE void start_rows(const Arguments& a, const Tile& t, Few& w) {
  std::memset(w.queries, 0, sizeof w.queries[0] * ROWS);
  for (int r = 0; r < ROWS; r++) {
    const Element *first = query_row(a, t, r), *second = ROPE > 0 ? query_rope_row(a, t, r) : nullptr;
    if constexpr (BF16_DOT) {
      std::memcpy(w.queries[r], first, WIDTH * sizeof(Element));
      if constexpr (ROPE > 0) std::memcpy(w.queries[r] + SECOND_PART, second, ROPE * sizeof(Element));
    } else {
      for (int d = 0; d < WIDTH; d++) w.queries[r][d] = number(first[d]);
      for (int d = 0; d < ROPE; d++) w.queries[r][SECOND_PART + d] = number(second[d]);
    }
    w.top[r] = LOWEST, w.total[r] = 0.f;
    std::fill_n(w.out[r], FEW_COLUMNS, 0.f);
  }
}

template <int ROWS, class KeyStride, class ValueStride>
static void attend_rows(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result,
                        KeyStride key_stride, ValueStride value_stride) {
  constexpr int TOKENS = LANES / ROWS;
  constexpr int UNITS = std::max(1, std::min(LANES / STEP / ROWS, VALUE_WIDTH / UNIT));
  Few& w = scratch<Few>();
  start_rows<ROWS>(a, t, w);
  for (int64_t first = low; first < high; first += FEW_BLOCK) {
    const int count = (int)std::min<int64_t>(FEW_BLOCK, high - first);
    const Sight sight = look(a, t, first, count, skip, result.skipped, w.bias[0], [](int r, int n) {
      return r * FEW_BLOCK + n;
    });
    if (sight == Sight::NONE) continue;
    for (int n = 0; n < count; n += TOKENS) {
      for (int i = 0; i < TOKENS; i++) {
        if constexpr (!VALUES_ARE_KEYS) prefetch(value_row(a, t, first + n + i), VALUE_WIDTH);
        if (first == low && first + n + i + PREFETCH < high) prefetch(key_row(a, t, first + n + i + PREFETCH), WIDTH);
      }
      if (n + TOKENS <= count) score<ROWS, TOKENS>(a, t, w, first, n, key_stride);
      else if (count > TOKENS) score<ROWS, TOKENS>(a, t, w, first, count - TOKENS, key_stride);  // some of them again
      else for (; n < count; n++) score<ROWS, 1>(a, t, w, first, n, key_stride);
    }
    for (int r = 0; r < ROWS; r++) weigh_row(a, w, r, count, sight == Sight::SOME);
    const Element* values = value_row(a, t, first);
    // The keys of the next block come while these values are added: memory is never idle.
    const Element* next = key_row(a, t, first + count);
    const int64_t coming = std::min<int64_t>(FEW_BLOCK, high - first - count);
    const auto whole = [](const Element* p) { return loaded(p); };
    int e = 0;
    const auto fetch = [&](int n) __attribute__((always_inline)) {
      const int part = std::min(UNITS * UNIT, WIDTH - e);
      if (n < coming && part > 0) prefetch(next + n * key_stride + e, part);
    };
    for (; e + UNITS * UNIT <= VALUE_WIDTH; e += UNITS * UNIT)
      add_values<ROWS, UNITS>(w, values, value_stride, count, e, whole, fetch);
    const auto none = [](int) {};
    if constexpr (UNITS > 1)
      for (; e + UNIT <= VALUE_WIDTH; e += UNIT) add_values<ROWS, 1>(w, values, value_stride, count, e, whole, none);
    if constexpr (VALUE_WIDTH % UNIT > 0)
      add_values<ROWS, 1>(w, values, value_stride, count, e, [](const Element* p) {
        return loaded(p, VALUE_WIDTH % UNIT);
      }, none);
  }
  for (int r = 0; r < ROWS; r++) {
    result.top[r] = w.top[r], result.total[r] = w.total[r];
    for (int e = 0; e < VALUE_WIDTH; e++) result.sum[r * OUT_STRIDE + e] = w.out[r][column(e)];
  }
}

template <int ROWS = FEW>
static void attend_few(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result) {
  if constexpr (ROWS > 1)
    if (t.rows != ROWS) return attend_few<ROWS - 1>(a, t, low, high, skip, result);
  const int64_t value_stride = VALUES_ARE_KEYS ? a.key_t : a.value_t;
  if (a.key_t == WIDTH && value_stride == VALUE_WIDTH) {  // tokens side by side
    std::integral_constant<int64_t, WIDTH> keys;
    std::integral_constant<int64_t, VALUE_WIDTH> values;
    attend_rows<ROWS>(a, t, low, high, skip, result, keys, values);
  } else {
    attend_rows<ROWS>(a, t, low, high, skip, result, a.key_t, value_stride);
  }
}
