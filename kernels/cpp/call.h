// ---- One call, its tiles, and what their rows see ----

struct Arguments {  // in the order of cpp_library.py; strides count elements
  const Element *query, *query_rope, *key, *key_rope, *value;
  const MaskElement* mask;
  const float* sinks;
  const bool* used;  // [batch, heads], or null: the rows of other heads are zeros
  Out* out;
  int64_t batch, key_heads, group, queries, keys;
  int64_t query_b, query_h, query_s, query_rope_b, query_rope_h, query_rope_s;
  int64_t key_b, key_h, key_t, key_rope_b, key_rope_h, key_rope_t, value_b, value_h, value_t;
  int64_t mask_b, mask_h, mask_s, mask_t;
  int64_t causal, window, offset, threads;
  double scale, cap;
};

// Rows are the (token, head of the group) pairs of one key head, head minor. Keys outside [low, high) are hidden.
struct Tile {
  int64_t b, k, first_row, low, high;
  int rows;
};

// What a range of keys gave the rows of a tile: weighed sums of values, log2 of the largest weight, sums of weights.
struct Partial {
  float *sum, *top, *total;  // sum[row * OUT_STRIDE + e]
  uint8_t* skipped;          // whether keys with the least finite bias were left out
};

constexpr float LOWEST = -3.2e38f;    // below every score; finite, so that differences are defined
constexpr float FORBIDDEN = -2.0e38f;  // finite biases below count as this: log2(e) times it is still a float

INLINE const Element* query_row(const Arguments& a, const Tile& t, int r) {
  const int64_t row = t.first_row + r;
  return a.query + t.b * a.query_b + (t.k * a.group + row % a.group) * a.query_h + row / a.group * a.query_s;
}
INLINE const Element* query_rope_row(const Arguments& a, const Tile& t, int r) {
  const int64_t row = t.first_row + r;
  return a.query_rope + t.b * a.query_rope_b + (t.k * a.group + row % a.group) * a.query_rope_h +
         row / a.group * a.query_rope_s;
}
INLINE const Element* key_row(const Arguments& a, const Tile& t, int64_t j) {
  return a.key + t.b * a.key_b + t.k * a.key_h + j * a.key_t;
}
INLINE const Element* key_rope_row(const Arguments& a, const Tile& t, int64_t j) {
  return a.key_rope + t.b * a.key_rope_b + t.k * a.key_rope_h + j * a.key_rope_t;
}
INLINE const Element* value_row(const Arguments& a, const Tile& t, int64_t j) {
  if constexpr (VALUES_ARE_KEYS) return key_row(a, t, j);
  return a.value + t.b * a.value_b + t.k * a.value_h + j * a.value_t;
}

INLINE bool is_used(const Arguments& a, const Tile& t, int64_t head) {
  return !a.used || a.used[t.b * a.key_heads * a.group + head];
}

INLINE void prefetch(const Element* p, int width) {
  for (int d = 0; d < width; d += 64 / (int)sizeof(Element)) __builtin_prefetch(p + d, 0, 2);
}

// Fetches tokens from `token` to `last`, a few cache lines at a time: more than a core can wait for would stop it.
constexpr int lines_of(int width) { return (width * (int)sizeof(Element) + 63) / 64; }

struct Ahead {
  static constexpr int KEY = lines_of(WIDTH), ROPES = lines_of(ROPE);
  static constexpr int VALUE = VALUES_ARE_KEYS ? 0 : lines_of(VALUE_WIDTH);
  static constexpr int LINES = KEY + ROPES + VALUE;

  const Arguments& a;
  const Tile& t;
  int64_t token, last;
  const char* at = nullptr;
  int part = 0, left = 0;

  INLINE_METHOD void fetch(int lines) {
    while (lines > 0 && (left > 0 || begin_row())) {
      const int now = std::min(lines, left);
      for (int i = 0; i < now; i++, at += 64) __builtin_prefetch(at, 0, 2);
      lines -= now, left -= now;
    }
  }

  INLINE_METHOD bool begin_row() {
    if (token >= last) return false;
    if (part == 0) at = (const char*)key_row(a, t, token), left = KEY;
    else if (ROPES > 0 && part == 1) at = (const char*)key_rope_row(a, t, token), left = ROPES;
    else at = (const char*)value_row(a, t, token), left = VALUE;
    if (++part == 1 + (ROPES > 0) + (VALUE > 0)) part = 0, token++;
    return true;
  }
};

// Room that a thread keeps. Its address is hidden: from a library, the compiler would ask for it in the inner loops.
template <class T>
INLINE T& scratch() {
  static thread_local T room;
  T* at = &room;
  asm("" : "+r"(at));
  return *at;
}

enum class Sight { NONE, SOME, ALL };

// Fills bias[place(row, n)], in units of log2, for `count` keys from `first` on; -inf hides. ALL: it is 0 everywhere
// and not filled. With `skip`, keys at the least finite bias (masks made of finfo.min) count as hidden.
template <class Place>
static Sight look(const Arguments& a, const Tile& t, int64_t first, int count, bool skip, uint8_t* skipped, float* bias,
                  Place place) {
  const int64_t first_token = t.first_row / a.group, last_token = (t.first_row + t.rows - 1) / a.group;
  const bool limited = (a.causal && first + count - 1 > first_token + a.offset) ||
                       (a.window > 0 && first <= last_token + a.offset - a.window);
  if (MASK == Mask::NONE && !limited) return Sight::ALL;
  bool any = false, all = MASK != Mask::ADDITIVE;
  int filled = 0;
  float line[count];
  const MaskElement* shown = nullptr;
  int64_t shown_token = -1;
  for (int r = 0; r < t.rows; r++) {
    const int64_t row = t.first_row + r, token = row / a.group, head = t.k * a.group + row % a.group;
    const MaskElement* mask = a.mask + t.b * a.mask_b + head * a.mask_h + token * a.mask_s + first * a.mask_t;
    if (r == 0 || token != shown_token || mask != shown) {
      shown = mask, shown_token = token;
      if constexpr (MASK == Mask::BOOL) {
        for (int n = 0; n < count; n++) line[n] = number(mask[n * a.mask_t]) != 0.f ? 0.f : -INFINITY;
      } else if constexpr (MASK == Mask::ADDITIVE) {
        for (int n = 0; n < count; n++) {
          const float x = number(mask[n * a.mask_t]);
          line[n] = x == -INFINITY ? x : (x < FORBIDDEN ? FORBIDDEN : x) * LOG2E;
        }
      } else {
        for (int n = 0; n < count; n++) line[n] = 0.f;
      }
      if (limited)
        for (int n = 0; n < count; n++) {
          const int64_t distance = token + a.offset - (first + n);
          if ((a.causal && distance < 0) || (a.window > 0 && distance >= a.window)) line[n] = -INFINITY;
        }
      const float least = MASK == Mask::ADDITIVE && skip ? LEAST_BIAS * LOG2E : LOWEST;
      bool visible = false, hidden = false;
      for (int n = 0; n < count; n++) {
        visible |= line[n] > least;
        hidden |= line[n] <= least;
        *skipped |= line[n] <= least && line[n] > LOWEST;
      }
      any |= visible, all &= !hidden;
    }
    if (all) continue;
    for (; filled <= r; filled++)  // rows before the first that hides a key see all
      for (int n = 0; n < count; n++) bias[place(filled, n)] = filled < r ? 0.f : line[n];
  }
  return all ? Sight::ALL : any ? Sight::SOME : Sight::NONE;
}
