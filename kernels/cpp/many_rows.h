// ---- Many rows: lanes are rows ----
//
// Queries are transposed once per tile, keys and values are packed once per block, unless few enough rows share them to
// read them where they are. Scores are S[n][row], so that the softmax needs no sum over lanes. The products are made by
// vectors or by tiles, in the part after this.

constexpr int GROUP = 2 * LANES;  // rows that go through the products together

struct Rows {  // what has a line for each step or token holds the rows of a group in it, see `line_of`
  alignas(64) Operand queries[TILE / GROUP][QUERY_STEPS * GROUP];  // zeros from KEY_STEPS on
  alignas(64) Operand keys[BLOCK * KEY_STRIDE];
  alignas(64) Operand values[VALUES_ARE_KEYS && !BF16_DOT ? 1 : VALUE_STEPS * VALUE_STRIDE];
  alignas(64) float scores[BLOCK * GROUP];
  alignas(64) Operand weights[VALUE_STEPS * GROUP];
  alignas(64) float bias[TILE / GROUP][BLOCK * GROUP];
  alignas(64) float out[TILE / GROUP][OUT_ROWS * GROUP];
  alignas(64) float top[TILE], total[TILE], keep[GROUP];
};

// One vector where a group has no two: lines with gaps would leave half of the sets of the cache unused.
constexpr int line_of(int vectors, int group) { return std::min(2, vectors - 2 * group) * LANES; }

// Where value e lies in a packed row: of 2 · LANES bfloat16 the even ones stand before the odd ones.
constexpr int column(int e) {
  return BF16_DOT ? e / (2 * LANES) * (2 * LANES) + e % 2 * LANES + e % (2 * LANES) / 2 : e;
}

INLINE void copy_widened(const Element* from, float* to, int width) {
  int d = 0;
  for (; d + LANES <= width; d += LANES) store(to + d, load(from + d));
  for (; d < width; d++) to[d] = number(from[d]);
}

static void pack(const Arguments& a, const Tile& t, int64_t first, int count, Rows& w) {
  std::memset(w.keys + count * KEY_STRIDE, 0, (BLOCK - count) * KEY_STRIDE * sizeof(Operand));
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
  if constexpr (BF16_DOT) {  // pairs of tokens in the order of `column`; the last of an odd count is paired with zeros
    const int pairs = (count + 1) / 2;
    std::memset(w.values + pairs * VALUE_STRIDE, 0, (VALUE_STEPS - pairs) * VALUE_STRIDE * sizeof(Operand));
    for (int n = 0; n < count; n += 2) {
      const uint16_t* even = (const uint16_t*)value_row(a, t, first + n);
      const uint16_t* odd = n + 1 < count ? (const uint16_t*)value_row(a, t, first + n + 1) : nullptr;
      uint32_t* values = (uint32_t*)w.values + n / 2 * VALUE_STRIDE;
      int e = 0;
      for (; e + 2 * LANES <= VALUE_WIDTH; e += 2 * LANES) {
        const Words x = load((const uint32_t*)(even + e)), y = odd ? load((const uint32_t*)(odd + e)) : Words{};
        store(values + e, (x & 0xffff) | y << 16);
        store(values + e + LANES, x >> 16 | (y & 0xffff0000));
      }
      for (; e < VALUE_WIDTH; e++) values[column(e)] = even[e] | (odd ? (uint32_t)odd[e] << 16 : 0);
    }
  }
}

// Operands k to k + LANES of a row.
INLINE Loaded query_operands(const Arguments& a, const Tile& t, int r, int k) {
  constexpr int FIRST = WIDTH / STEP;
  if (k + LANES <= FIRST) return loaded(query_row(a, t, r) + k * STEP);
  if (ROPE > 0 && k >= FIRST && k + LANES <= KEY_STEPS) return loaded(query_rope_row(a, t, r) + (k - FIRST) * STEP);
  alignas(64) Element both[UNIT] = {};
  for (int i = 0; i < UNIT; i++) {
    const int d = k * STEP + i;
    if (d < WIDTH) both[i] = query_row(a, t, r)[d];
    else if (ROPE > 0 && d < WIDTH + ROPE) both[i] = query_rope_row(a, t, r)[d - WIDTH];
  }
  return loaded(both);
}

static void transpose_queries(const Arguments& a, const Tile& t, Rows& w, int vectors) {
  for (int r = 0; r < t.rows; r += LANES) {
    const int line = line_of(vectors, r / GROUP);
    Operand* lines = w.queries[r / GROUP] + r % GROUP;
    for (int k = 0; k < KEY_STEPS; k += LANES) {
      Loaded square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = r + i < t.rows ? query_operands(a, t, r + i, k) : Loaded{};
      transpose(square);
      for (int i = 0; i < std::min(LANES, KEY_STEPS - k); i++) *(Loaded*)(lines + (k + i) * line) = square[i];
    }
    for (int k = KEY_STEPS; k < QUERY_STEPS; k++) *(Loaded*)(lines + k * line) = Loaded{};
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
  constexpr int LINE = VECTORS * LANES;
  for (int v = 0; v < VECTORS; v++) {
    const int at = v * LANES;
    float factor = (float)a.scale * LOG2E;
    if constexpr (CAPPED) {
      const float inner = (float)(a.scale / a.cap), outer = (float)a.cap;
      factor = LOG2E;
      for (float* s = w.scores + at; s < w.scores + count * LINE; s += LINE) store(s, outer * tanh_of(load(s) * inner));
    }
    const auto score = [&](int n) {
      const Floats s = load(w.scores + n * LINE + at) * factor;
      return biased ? s + load(w.bias[group] + n * LINE + at) : s;
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
        store((uint32_t*)w.weights + n / STEP * LINE + at, pair(weight, next));
      } else {
        store((float*)w.weights + n * LINE + at, weight);
      }
    }
    const Floats keep = power_of_two(before - top);
    store(w.keep + at, keep);
    store(w.top + group * GROUP + at, top);
    store(w.total + group * GROUP + at, load(w.total + group * GROUP + at) * keep + total);
  }
}

// What the next part defines: scores, weights and outputs of a block for the rows of a group, whether that many vectors
// of rows read whole blocks in the cache instead of packed ones, and the outputs [row][e] with a stride of OUT_STRIDE.
template <int VECTORS>
static void attend_group(const Arguments& a, const Tile& t, Rows& w, int group, int64_t first, int count, int64_t end,
                         bool biased, bool packed);
INLINE bool reads_cache(const Arguments& a, int vectors);
INLINE void write_sums(const Rows& w, int rows, float* sum);
INLINE void begin_products();
INLINE void end_products();

static void attend_many(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result) {
  Rows& w = scratch<Rows>();
  const int vectors = (t.rows + LANES - 1) / LANES, groups = (vectors + 1) / 2;
  begin_products();
  transpose_queries(a, t, w, vectors);
  std::memset(w.out, 0, groups * sizeof w.out[0]);
  std::fill_n(w.top, groups * GROUP, LOWEST);
  std::fill_n(w.total, groups * GROUP, 0.f);
  const auto place = [=](int r, int n) {
    return r / GROUP * BLOCK * GROUP + n * line_of(vectors, r / GROUP) + r % GROUP;
  };
  for (int64_t first = low; first < high; first += BLOCK) {
    const int count = (int)std::min<int64_t>(BLOCK, high - first);
    const Sight sight = look(a, t, first, count, skip, result.skipped, w.bias[0], place);
    if (sight == Sight::NONE) continue;
    const bool packed = count < BLOCK || !reads_cache(a, vectors);
    if (packed) pack(a, t, first, count, w);
    for (int g = 0; g < groups; g++)
      (2 * g + 1 < vectors ? attend_group<2> : attend_group<1>)(a, t, w, g, first, count, high, sight == Sight::SOME,
                                                                packed);
  }
  end_products();
  std::copy_n(w.top, t.rows, result.top);
  std::copy_n(w.total, t.rows, result.total);
  write_sums(w, t.rows, result.sum);
}
