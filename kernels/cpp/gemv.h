// ---- Products of a few rows with matrices: each matrix is read once, as it lies in memory ----
//
// A line is what lies side by side in a matrix: all inputs of one output, or BY_COLUMNS all outputs of one input.

struct Product {  // in the order of gemv_library.py; strides count elements
  const Element *rows, *matrix, *bias;
  Element* out;
  int64_t batch, inputs, outputs;  // out[b m n] = sum over k of rows[b m k] matrix[b n k] + bias[n]
  int64_t row_b, row_m, matrix_b, line, out_b, out_m;
};

constexpr int TOGETHER = std::max(1, std::min(8, LANES / ROWS));  // lines, or vectors of one line, whose sums fit
constexpr int COLUMNS = TOGETHER * LANES;
constexpr int64_t SHORT = 2048 / sizeof(Element);  // a line that ends before its prefetch has begun
constexpr int64_t NEAR = 16 << 10;                 // bytes of rows that stay in the first cache
constexpr int64_t STRETCH = 64;                    // inputs that are summed in one go
constexpr int64_t WORTH = 128 << 10;               // bytes of matrices that a thread is woken for

INLINE float bias_of(const Product& p, int64_t n) { return p.bias ? number(p.bias[n]) : 0.f; }

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

// Outputs n to n + count: a part of each line, line by line. Whole vectors, or less than one.
template <int VECTORS, bool WHOLE>
INLINE void columns(const Product& p, int64_t b, int64_t n, int count) {
  const Element *rows = p.rows + b * p.row_b, *line = p.matrix + b * p.matrix_b + n;
  Floats total[ROWS][VECTORS] = {};
  for (int64_t begin = 0; begin < p.inputs; begin += STRETCH) {  // short sums, which round less
    Floats sums[ROWS][VECTORS] = {};
#pragma GCC unroll 4
    for (int64_t k = begin; k < std::min(begin + STRETCH, p.inputs); k++, line += p.line) {
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; i++) {
        if (i % (64 / LANES / (int)sizeof(Element)) == 0) __builtin_prefetch(line + 8 * p.line + i * LANES);
        const Floats y = WHOLE ? load(line + i * LANES) : load_part(line, count);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) sums[m][i] += number(rows[m * p.row_m + k]) * y;
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int i = 0; i < VECTORS; i++) total[m][i] += sums[m][i];
  }
  for (int m = 0; m < ROWS; m++)
    for (int i = 0; i < count; i++)
      put(p.out + b * p.out_b + m * p.out_m + n + i, total[m][i / LANES][i % LANES] + bias_of(p, n + i));
}

// A range of outputs of one matrix of the batch.
static void multiply(const Product& p, int64_t b, int64_t low, int64_t high) {
  int64_t n = low;
  if constexpr (BY_COLUMNS) {
    for (; n + COLUMNS <= high; n += COLUMNS) columns<TOGETHER, true>(p, b, n, COLUMNS);
    for (; n + LANES <= high; n += LANES) columns<1, true>(p, b, n, LANES);
    if (n < high) columns<1, false>(p, b, n, (int)(high - n));
  } else {
    if (ROWS * p.inputs * (int64_t)sizeof(Element) <= NEAR)
      for (; n + TOGETHER <= high; n += TOGETHER) dots_in_turn<TOGETHER>(p, b, n);
    for (; n + TOGETHER <= high; n += TOGETHER) dots<TOGETHER>(p, b, n);
    for (; n < high; n++) dots<1>(p, b, n);
  }
}

// Outputs of one item: whole groups, of about so many bytes.
static int64_t outputs_of_item(const Product& p, int64_t bytes) {
  const int64_t group = BY_COLUMNS ? COLUMNS : TOGETHER;
  return std::max<int64_t>(1, bytes / (group * p.inputs * (int64_t)sizeof(Element) + 1)) * group;
}

extern "C" void latent_gemv(const Product* products, int64_t count, int64_t threads) {
  int64_t bytes = 0, items = 0;
  for (int64_t i = 0; i < count; i++)
    bytes += products[i].batch * products[i].outputs * products[i].inputs * (int64_t)sizeof(Element);
  const int64_t item_bytes = std::max(WORTH / 2, bytes / (4 * threads));
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
