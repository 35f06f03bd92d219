// ---- Tiles and splits over threads ----

static void attend(const Arguments& a, const Tile& t, int64_t low, int64_t high, bool skip, Partial result) {
  (t.rows <= FEW ? attend_few<> : attend_many)(a, t, low, high, skip, result);
}

// Partial sums weigh 2^(top - largest top); a sink takes part in the total alone. Rows without a key are zeros.
static void write_rows(const Arguments& a, const Tile& t, const Partial* parts, int splits) {
  for (int r = 0; r < t.rows; r++) {
    const int64_t row = t.first_row + r, head = t.k * a.group + row % a.group;
    float top = LOWEST, total = 0.f, sum[VALUE_WIDTH] = {};
    const int counted = is_used(a, t, head) ? splits : 0;
    for (int i = 0; i < counted; i++) top = std::max(top, parts[i].top[r]);
    if constexpr (SINKS) {
      top = std::max(top, a.sinks[head] * LOG2E);
      total = exp2f(a.sinks[head] * LOG2E - top);
    }
    for (int i = 0; i < counted; i++) {
      if (parts[i].total[r] == 0.f) continue;
      const float weight = exp2f(parts[i].top[r] - top), *part = parts[i].sum + r * OUT_STRIDE;
      total += weight * parts[i].total[r];
      for (int e = 0; e < VALUE_WIDTH; e++) sum[e] += weight * part[e];
    }
    Out* out = a.out + (((t.b * a.key_heads * a.group + head) * a.queries) + row / a.group) * (VALUE_WIDTH + TOTALS);
    const float one_over = total == 0.f ? 0.f : 1.f / total;
    for (int e = 0; e < VALUE_WIDTH; e++) put(out + e, sum[e] * one_over);
    if constexpr (TOTALS) put(out + VALUE_WIDTH, total == 0.f ? -INFINITY : (top + log2f(total)) / LOG2E);
  }
}

// Masks of finfo.min were skipped in the hope that each row sees another key. Where one does not, they all count again.
static bool hope_failed(const Tile& t, const Partial* parts, int splits) {
  bool skipped = false;
  for (int i = 0; i < splits; i++) skipped |= *parts[i].skipped;
  for (int r = 0; skipped && r < t.rows; r++) {
    float top = LOWEST;
    for (int i = 0; i < splits; i++) top = std::max(top, parts[i].top[r]);
    if (top < -2e4f) return true;
  }
  return false;
}

extern "C" void latent_attention(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int64_t rows = a.queries * a.group, most = rows <= FEW ? FEW : TILE;
  if (a.batch == 0 || rows == 0) return;
  const int64_t tiles = (rows + most - 1) / most;
  const int64_t even = (rows + tiles - 1) / tiles, height = rows <= FEW ? rows : (even + LANES - 1) / LANES * LANES;
  const int64_t all_tiles = a.batch * a.key_heads * tiles;
  const int64_t block = rows <= FEW ? FEW_BLOCK : BLOCK;

  // Splits: four items a thread, each of at least WORTH products, and whole blocks.
  const int64_t work = height * a.keys * (WIDTH + ROPE + VALUE_WIDTH);
  const int64_t wanted = all_tiles >= 4 * a.threads ? 1 : (4 * a.threads + all_tiles - 1) / all_tiles;
  const int64_t splits = std::max<int64_t>(1, std::min({wanted, work / WORTH, (a.keys + block - 1) / block}));
  const int64_t items = all_tiles * splits;
  const int threads = (int)std::min(a.threads, all_tiles * work < 2 * WORTH ? 1 : items);

  static thread_local std::vector<float> storage;
  const int64_t size = height * (OUT_STRIDE + 2);
  storage.resize(splits > 1 ? items * size : 0);
  float* const partials = storage.data();
  std::vector<int> finished(splits > 1 ? all_tiles : 0);
  std::vector<uint8_t> skipped(items);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local std::vector<float> own;
    if (splits == 1) own.resize(size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++) {
      const int64_t tile = item / splits, i = item % splits;
      const int64_t bk = tile / tiles, first_row = (tiles - 1 - tile % tiles) * height;  // causal: longest first
      Tile t{bk / a.key_heads, bk % a.key_heads, first_row, 0, a.keys, (int)std::min(height, rows - first_row)};
      if (t.rows <= 0) continue;
      if (a.window > 0) t.low = std::max<int64_t>(0, first_row / a.group + a.offset - a.window + 1);
      if (a.causal) t.high = std::min(a.keys, (first_row + t.rows - 1) / a.group + a.offset + 1);
      bool used = false;
      for (int g = 0; g < a.group; g++) used |= is_used(a, t, t.k * a.group + g);
      if (!used) t.high = t.low;

      const auto partial = [&](int64_t n) {
        float* at = splits == 1 ? own.data() : partials + (tile * splits + n) * size;
        return Partial{at, at + height * OUT_STRIDE, at + height * (OUT_STRIDE + 1), &skipped[tile * splits + n]};
      };
      const int64_t blocks = (t.high - t.low + block - 1) / block, each = (blocks + splits - 1) / splits * block;
      attend(a, t, t.low + i * each, std::min(t.high, t.low + (i + 1) * each), true, partial(i));
      if (splits > 1 && __atomic_add_fetch(&finished[tile], 1, __ATOMIC_ACQ_REL) < splits) continue;
      Partial parts[splits];  // the last split to finish writes the rows
      for (int64_t n = 0; n < splits; n++) parts[n] = partial(n);
      const bool again = MASK == Mask::ADDITIVE && hope_failed(t, parts, (int)splits);
      if (again) attend(a, t, t.low, t.high, false, parts[0]);
      write_rows(a, t, parts, again ? 1 : (int)splits);
    }
  }
}
