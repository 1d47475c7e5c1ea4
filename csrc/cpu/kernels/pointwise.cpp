// A convolution of one-element kernels: one matrix product, whose rows are the positions of all samples.
//
// A block of rows is read once, activated, into the left operand of all panels of weights. So many words of a panel as the
// first-level cache holds then meet eight of the rows after another eight; after the last words, what they give is
// finished. Threads have rows of their own where there are enough of them; else they share the rows, and each has panels
// of its own, so that weights are read once.
#include "../pointwise.h"

#include "../conv_input.h"
#include "../faults.h"
#include "../integers.h"
#include "../isa.h"
#include "../matrix.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t PART = 64;               // rows whose moments are taken together, and the least of a thread
constexpr int64_t LONGEST = 512;           // rows of a block
constexpr int64_t OPERAND = 320 << 10;     // floats of a block: they stay in the last cache
constexpr int64_t LINE = 16;               // words of a cache line

template <bool PAIRS>
struct Pointwise : Sizes<PAIRS> {
  using Sizes<PAIRS>::ROWS, Sizes<PAIRS>::PANEL, Sizes<PAIRS>::LONGEST_SUM;
  const ConvArguments& p;
  ConvInput input{p};
  int64_t positions, rows;     // of a sample, of all
  int64_t words, blocks_k;     // of a product
  int64_t panels, block;       // block: rows
  int64_t operand;             // floats of a block
  bool by_panels;              // how threads divide the work
  float *operands, *products, *partial;

  explicit Pointwise(const ConvArguments& p) : p(p) {
    positions = p.depth * p.height * p.width;
    rows = p.samples * positions;
    words = p.shape.words();
    blocks_k = ceil_divide(words, BLOCK);
    panels = ceil_divide(p.shape.out_channels, PANEL);
    block = OPERAND / (blocks_k * BLOCK) / PART * PART;
    block = at_most(block < PART ? PART : block, LONGEST);
    operand = at_most(ceil_divide(rows, ROWS) * ROWS, block) * blocks_k * BLOCK;
    int64_t parts = ceil_divide(rows, PART);
    by_panels = p.threads > 1 && (parts % p.threads || rows < LONGEST * p.threads) && parts < 16 * p.threads;
    if (by_panels && panels < p.threads) by_panels = parts < p.threads;
  }

  // ---- where rows lie

  // Rows from `first` on, in the tensors.
  struct Places {
    int32_t sample[LONGEST];
    int64_t h[LONGEST], skip[LONGEST], residual[LONGEST], out[LONGEST];
  };

  static int64_t place(const ConvTensor& t, int64_t n, int64_t z, int64_t y, int64_t x) {
    return t.image(n, z) + y * t.y + x * t.x;
  }

  void find(Places& places, int64_t first, int64_t count) const {
    int64_t n = first / positions, x = first % p.width, y = first / p.width % p.height;
    int64_t z = first % positions / (p.width * p.height);
    for (int64_t i = 0; i < count; ++i) {
      places.sample[i] = (int32_t)n;
      places.h[i] = place(p.h, n, z, y, x);
      places.skip[i] = place(p.skip, n, z, y, x);
      places.residual[i] = place(p.residual, FAULT(residual_of_first_sample) ? 0 : n, z, y, x);
      places.out[i] = place(p.out, n, z, y, x);
      if (++x < p.width) continue;
      x = 0;
      if (++y < p.height) continue;
      y = 0;
      if (++z < p.depth) continue;
      z = 0;
      ++n;
    }
  }

  // ---- the left operand

  // Channels from c on, those that there are, of a row of the left operand.
  CMFAST_INLINE void put(const Places& places, int64_t i, int64_t c, const ConvInput::Activation& f, float* to) const {
    ConvInput::Source source = input.source(0, 0, c);
    Floats x = f(source.read(source.second ? places.skip[i] : places.h[i], places.skip[i]));
    if (PAIRS) store_bfloat16((uint16_t*)to + c / 32 * (ROWS * 32) + c % 32, x);
    else store(to + c / BLOCK * (ROWS * BLOCK) + c % BLOCK, x);
  }

  // Row after row, as they lie in memory.
  void put_rows(const Places& places, int64_t first, int64_t count, float* to) const {
    int64_t channels = input.channels(), whole = channels / LANES * LANES;
    int64_t filled = p.shape.tiled() ? p.shape.tap_stride() : channels;
    to += first / ROWS * blocks_k * (ROWS * BLOCK);
    for (int64_t i = first; i < first + count; ++i, to += BLOCK) {
      int64_t n = places.sample[i];
      ConvInput::Activation f{all(1.0f), zeros(), p.gain != nullptr, p.silu};
      for (int64_t c = 0; c < whole; c += LANES) {
        if (p.gain) f.gain = load(p.gain + n * channels + c), f.offset = load(p.offset + n * channels + c);
        put(places, i, c, f, to);
      }
      for (int64_t c = whole; c < filled; c += LANES) put(places, i, c, input.activation(n, c), to);
    }
  }

  // ---- the outputs

  // Each sample is divided into the same parts, so that its moments are the same bits whatever the other samples are.
  int64_t parts_of_sample() const { return ceil_divide(positions, PART); }
  int64_t part_begin(int64_t row) const { return row - row % positions % PART; }
  int64_t part_end(int64_t row) const {
    return at_most(part_begin(row) + PART, FAULT(part_across_samples) ? rows : (row / positions + 1) * positions);
  }
  int64_t slot(int64_t row) const { return row / positions * parts_of_sample() + row % positions / PART; }

  // The sums of a panel's channels over the part so far.
  struct Sums {
    Moments of[PANEL / LANES];
    int64_t begin, end;  // rows of the part
  };

  // Add bias and residual to `count` rows of a panel's products and write them. WHOLE: all lanes, of float32.
  template <bool WHOLE>
  void write(const Places& places, int64_t first, int64_t i, int64_t count, int64_t panel, const float* from,
             Sums& sums) const {
    const int dtype = WHOLE ? (int)FLOAT32 : p.dtype;
    int64_t o = panel * PANEL, width = at_most(p.shape.out_channels - o, PANEL);
    if (FAULT(tail_of_outputs_missed)) width = width / LANES * LANES;
    for (int64_t m = 0; m < count; ++m, from += PANEL) {
      int64_t row = first + i + m, to = places.out[i + m] + o, at = places.residual[i + m] + o;
      bool begins = partial && row == sums.end;
      if (begins) sums.begin = row, sums.end = part_end(row);
      for (int64_t j = 0, v = 0; j < (WHOLE ? PANEL : width); j += LANES, ++v) {
        int lanes = WHOLE ? LANES : (int)at_most(width - j, LANES);
        Floats value = load(from + j);
        if (p.bias) value += load(p.bias + o + j, lanes);
        if (p.relu && FAULT(relu_before_residual)) value = max(zeros(), value);
        if (p.residual.data) value += load(p.residual.data, dtype, at + j, lanes);
        if (p.relu && !FAULT(relu_before_residual)) value = max(zeros(), value);  // NaN stays
        store((void*)p.out.data, dtype, to + j, value, lanes);
        if (!partial) continue;
        if (begins) sums.of[v].begin(value);
        sums.of[v].add(value);
      }
      if (!partial || row + 1 < sums.end) continue;
      float* means = partial + slot(sums.begin) * 2 * p.shape.out_channels + o;
      for (int64_t j = 0, v = 0; j < width; j += LANES, ++v)
        sums.of[v].finish(means + j, means + p.shape.out_channels + j, sums.end - sums.begin,
                          (int)at_most(width - j, LANES));
    }
  }

  // ---- the products of a panel with rows `first` on

  void multiply(const Places& places, int64_t first, int64_t count, int64_t panel, const float* from,
                float* products) const {
    int width = (int)at_most(p.shape.columns() - panel * PANEL, PANEL);
    const uint32_t* weights = p.weights + panel * PANEL * words;
    int64_t groups = ceil_divide(count, ROWS), lines = words * width / LINE;
    // Each product fetches its part of the next panel.
    int64_t ahead = ceil_divide(lines, groups * blocks_k);
    const char* next = (const char*)(weights + words * width);
    Sums sums{{}, first, first};
    bool whole = p.dtype == FLOAT32 && p.shape.out_channels - panel * PANEL >= PANEL;
    // So few words of the panel that they stay in the first cache meet all rows, before the next ones do.
    for (int64_t k = 0; k < words; k += LONGEST_SUM) {
      int64_t here_k = at_most(words - k, LONGEST_SUM);
      for (int64_t i = 0; i < count; i += ROWS, next += ceil_divide(here_k, BLOCK) * ahead * 64) {
        int64_t here = at_most(count - i, ROWS);
        if (FAULT(last_rows_missed) && here < ROWS) break;
        const float* rows = from + (i / ROWS * blocks_k * BLOCK + k) * ROWS;
        float* tile = products + i * PANEL;
        multiply_rows<PAIRS>((int)here, (const uint32_t*)rows, weights + k * width, width, here_k,
                             {tile, PANEL, BLOCK, k > 0}, {next, ahead});
        if (k + here_k < words) continue;
        if (whole) write<true>(places, first, i, here, panel, tile, sums);
        else write<false>(places, first, i, here, panel, tile, sums);
      }
    }
  }

  // ----

  void work(Team team) const {
    // Threads and blocks have whole parts.
    auto whole = [&](int64_t row) { return row < rows ? part_begin(row) : rows; };
    Share mine = share(ceil_divide(rows, PART), team), all_panels = {0, panels}, panels_of_mine = all_panels;
    float* to = operands;
    if (by_panels) {
      mine = {0, ceil_divide(rows, PART)};
      panels_of_mine = share(panels, team);
    } else {
      to += team.rank * operand;
    }
    Places places;
    int64_t end = whole(mine.end * PART);
    for (int64_t first = whole(mine.begin * PART), next; first < end; first = next) {
      next = at_most(whole(first + block), end);
      int64_t count = next - first, groups = ceil_divide(count, ROWS);
      find(places, first, count);
      Share put = by_panels ? share(groups, team) : Share{0, groups};
      for (int64_t g = put.begin; g < put.end; ++g) put_rows(places, g * ROWS, at_most(count - g * ROWS, ROWS), to);
      if (by_panels) team.barrier();
      for (int64_t panel = panels_of_mine.begin; panel < panels_of_mine.end; ++panel)
        multiply(places, first, count, panel, to, products + team.rank * LONGEST * PANEL);
      if (by_panels && next < end) team.barrier();
    }
    if (!partial) return;
    team.barrier();
    Share merged = share(panels, team);
    int64_t channels = p.shape.out_channels;
    for (int64_t n = 0; n < p.samples; ++n) {
      int64_t begin = n * positions;
      auto count = [&](int64_t k) { return part_end(begin + k * PART) - (begin + k * PART); };
      merge_moments(partial + slot(begin) * 2 * channels, parts_of_sample(), channels, merged.begin * PANEL,
                    at_most(merged.end * PANEL, channels), count, p.moments + n * 2 * channels);
    }
  }

  const char* run() {
    // So little arithmetic, and so few weights to read, that a second thread would be waited for.
    bool small = rows * words * p.shape.columns() < (1 << 19) && words * p.shape.columns() < (1 << 16);
    int threads = small ? 1 : p.threads;
    operands = (float*)scratch(SCRATCH_INPUT, (by_panels ? 1 : threads) * operand * 4);
    products = (float*)scratch(SCRATCH_PRODUCTS, threads * LONGEST * PANEL * 4);
    int64_t slots = p.samples * parts_of_sample();
    partial = p.moments ? (float*)scratch(SCRATCH_STATISTICS, slots * 2 * p.shape.out_channels * 4) : nullptr;
    if (!operands || !products || (p.moments && !partial)) return "no memory for the operands";
    auto body = [&](Team team) {
      TileUse tiles;
      work(team);
    };
    parallel(threads, body);
    return nullptr;
  }
};

}  // namespace

const char* pointwise(const ConvArguments& p) {
  return p.shape.pairs ? Pointwise<true>(p).run() : Pointwise<false>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
