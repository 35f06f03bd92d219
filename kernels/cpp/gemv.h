// ---- Products of a few rows with matrices: each matrix is read once, as it lies in memory ----
//
// A line is what lies side by side in a matrix: all inputs of one output, or BY_COLUMNS all outputs of one input.
// Where it SKIPS, lines belong to heads, `width` each, and those of heads that are not used are taken for zeros.

struct Product {  // in the order of gemv_library.py; strides count elements
  const Element *rows, *matrix, *bias;
  Element* out;
  int64_t batch, inputs, outputs;  // out[b m n] = sum over k of rows[b m k] matrix[b n k] + bias[n]
  int64_t row_b, row_m, matrix_b, line, out_b, out_m;
  const bool* used;
  int64_t width;
};

constexpr int TOGETHER = std::max(1, std::min(8, LANES / ROWS));  // lines whose sums, or inputs, fit into registers
constexpr int COLUMNS = 1024 / ROWS / LANES * LANES;               // outputs whose sums fit into the first cache
constexpr int64_t SHORT = 2048 / sizeof(Element);  // a line that ends before its prefetch has begun
constexpr int64_t NEAR = 16 << 10;                 // bytes of rows that stay in the first cache
constexpr int64_t STRETCH = 64;                    // inputs that are summed in one go
constexpr int64_t WORTH = 128 << 10;               // bytes of matrices that a thread is woken for

INLINE float bias_of(const Product& p, int64_t n) { return p.bias ? number(p.bias[n]) : 0.f; }

// Whether a line is one of a head that is used, and where the lines of its head end.
INLINE bool is_used(const Product& p, int64_t line) { return !SKIPS || p.used[line / p.width]; }
INLINE int64_t end_of_head(const Product& p, int64_t line) {
  return SKIPS ? (line / p.width + 1) * p.width : INT64_MAX;
}

// Outputs n to n + lines: what the sums of their lines, row by row, add up to.
INLINE void write(const Product& p, int64_t b, int64_t n, Floats* sums, int lines) {
  alignas(64) float total[LANES];
  store(total, sums_of(sums));
  for (int m = 0; m < ROWS; m++)
    for (int i = 0; i < lines; i++)
      put(p.out + b * p.out_b + m * p.out_m + n + i, total[m * lines + i] + bias_of(p, n + i));
}

// Outputs n to n + LINES: all their lines at once.
template <int LINES>
INLINE void dots(const Product& p, int64_t b, int64_t n) {
  const Element *rows = p.rows + b * p.row_b, *lines = p.matrix + b * p.matrix_b + n * p.line;
  const int64_t ahead = p.inputs < SHORT ? LINES * p.line : SHORT / 2;
  Floats sums[std::max(LINES * ROWS, LANES)] = {};
  const auto step = [&](int64_t k, auto at) __attribute__((always_inline)) {
    Loaded x[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) x[m] = at(rows + m * p.row_m + k);
#pragma GCC unroll 8
    for (int i = 0; i < LINES; i++) {
      const Element* line = lines + i * p.line + k;
      __builtin_prefetch(line + ahead);
      const Loaded y = at(line);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) sums[m * LINES + i] = add_product(sums[m * LINES + i], x[m], y);
    }
  };
  int64_t k = 0;
  for (; k + UNIT <= p.inputs; k += UNIT) step(k, [](const Element* at) { return loaded(at); });
  if (const int rest = (int)(p.inputs - k)) step(k, [rest](const Element* at) { return loaded(at, rest); });
  write(p, b, n, sums, LINES);
}

// The same line by line, so that a matrix is read in one stream, which some machines read up to half as fast again.
// The rows are read once for each line: only where they are near.
template <int LINES>
INLINE void dots_in_turn(const Product& p, int64_t b, int64_t n) {
  constexpr int64_t AHEAD = 4096 / sizeof(Element);
  const Element *rows = p.rows + b * p.row_b, *line = p.matrix + b * p.matrix_b + n * p.line;
  Floats sums[std::max(LINES * ROWS, LANES)] = {};
  for (int i = 0; i < LINES; i++, line += p.line) {
    Floats even[ROWS] = {}, odd[ROWS] = {};
    const auto step = [&](Floats* to, int64_t k, auto at) __attribute__((always_inline)) {
      __builtin_prefetch(line + k + AHEAD);
      const Loaded y = at(line + k);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) to[m] = add_product(to[m], at(rows + m * p.row_m + k), y);
    };
    const auto whole = [](const Element* at) { return loaded(at); };
    int64_t k = 0;
    for (; k + 2 * UNIT <= p.inputs; k += 2 * UNIT) step(even, k, whole), step(odd, k + UNIT, whole);
    if (k + UNIT <= p.inputs) step(even, k, whole), k += UNIT;
    if (const int rest = (int)(p.inputs - k)) step(odd, k, [rest](const Element* at) { return loaded(at, rest); });
    for (int m = 0; m < ROWS; m++) sums[m * LINES + i] = even[m] + odd[m];
  }
  write(p, b, n, sums, LINES);
}

// Some lines at once times their inputs, added to sums of `count` outputs.
template <int LINES>
INLINE void add_lines(const Product& p, const Element* inputs, const Element* line, float (*sums)[COLUMNS], int count) {
  float x[LINES][ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < LINES; i++)
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) x[i][m] = number(inputs[m * p.row_m + i]);
  const auto step = [&](int n, auto at) __attribute__((always_inline)) {
    Floats sum[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) sum[m] = load(sums[m] + n);
#pragma GCC unroll 8
    for (int i = 0; i < LINES; i++) {
      __builtin_prefetch(line + (LINES + i) * p.line + n);
      const Floats y = at(line + i * p.line + n);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; m++) sum[m] += x[i][m] * y;
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) store(sums[m] + n, sum[m]);
  };
  int n = 0;
  for (; n + LANES <= count; n += LANES) step(n, [](const Element* at) { return load(at); });
  if (const int rest = count - n) step(n, [rest](const Element* at) { return load_part(at, rest); });
}

// Outputs n to n + count: long parts of a few lines at a time, as memory is read best. The sums stay in a cache.
static void columns(const Product& p, int64_t b, int64_t n, int count) {
  const Element *rows = p.rows + b * p.row_b, *line = p.matrix + b * p.matrix_b + n;
  alignas(64) float sums[ROWS][COLUMNS], total[ROWS][COLUMNS] = {};
  for (int64_t begin = 0, end; begin < p.inputs; begin = end) {  // short sums, which round less
    end = std::min({begin + STRETCH, p.inputs, end_of_head(p, begin)});
    if (!is_used(p, begin)) continue;
    std::memset(sums, 0, sizeof sums);
    int64_t k = begin;
    for (; k + TOGETHER <= end; k += TOGETHER) add_lines<TOGETHER>(p, rows + k, line + k * p.line, sums, count);
    for (; k < end; k++) add_lines<1>(p, rows + k, line + k * p.line, sums, count);
    for (int m = 0; m < ROWS; m++)
      for (int i = 0; i < count; i++) total[m][i] += sums[m][i];
  }
  for (int m = 0; m < ROWS; m++)
    for (int i = 0; i < count; i++) put(p.out + b * p.out_b + m * p.out_m + n + i, total[m][i] + bias_of(p, n + i));
}

// Outputs n to end line by line.
static void lines(const Product& p, int64_t b, int64_t n, int64_t end) {
  if (ROWS * p.inputs * (int64_t)sizeof(Element) <= NEAR)
    for (; n + TOGETHER <= end; n += TOGETHER) dots_in_turn<TOGETHER>(p, b, n);
  for (; n + TOGETHER <= end; n += TOGETHER) dots<TOGETHER>(p, b, n);
  for (; n < end; n++) dots<1>(p, b, n);
}

// A range of outputs of one matrix of the batch.
static void multiply(const Product& p, int64_t b, int64_t low, int64_t high) {
  for (int64_t n = low, end; n < high; n = end) {
    if constexpr (BY_COLUMNS) {
      end = std::min(n + COLUMNS, high);
      columns(p, b, n, (int)(end - n));
    } else {
      end = std::min(high, end_of_head(p, n));
      if (is_used(p, n)) lines(p, b, n, end);
      else
        for (int m = 0; m < ROWS; m++)
          for (int64_t i = n; i < end; i++) put(p.out + b * p.out_b + m * p.out_m + i, 0.f);
    }
  }
}

// Outputs of one item: whole groups, of about so many bytes.
static int64_t outputs_of_item(const Product& p, int64_t bytes) {
  const int64_t group = BY_COLUMNS ? LANES : TOGETHER;
  return std::max<int64_t>(1, bytes / (group * p.inputs * (int64_t)sizeof(Element) + 1)) * group;
}

extern "C" void latent_gemv(const Product* products, int64_t count, int64_t threads) {
  int64_t bytes = 0, items = 0;
  for (int64_t i = 0; i < count; i++)
    bytes += products[i].batch * products[i].outputs * products[i].inputs * (int64_t)sizeof(Element);
  const int64_t item_bytes = std::max(WORTH / 2, bytes / ((BY_COLUMNS ? 1 : 4) * threads));
  for (int64_t i = 0; i < count; i++) {
    const int64_t each = outputs_of_item(products[i], item_bytes);
    items += products[i].batch * ((products[i].outputs + each - 1) / each);
  }
  const int used = (int)(bytes < WORTH ? 1 : std::min(threads, items));
#pragma omp parallel for schedule(dynamic, 1) num_threads(used) if (used > 1)
  for (int64_t item = 0; item < items; item++) {
    const Product* p = products;
    int64_t rest = item, each, parts;
    for (;; rest -= p->batch * parts, p++) {
      each = outputs_of_item(*p, item_bytes), parts = (p->outputs + each - 1) / each;
      if (rest < p->batch * parts) break;
    }
    const int64_t low = rest % parts * each;
    multiply(*p, rest / parts, low, std::min(p->outputs, low + each));
  }
}
