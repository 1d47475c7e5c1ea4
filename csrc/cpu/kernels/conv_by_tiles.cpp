// The direct form of conv2d in bfloat16, by a processor's tiles.
//
// A block is some rows of an image, or several whole images. Its input is read once, activated, resampled and padded, into
// planes [channels/32][rows][columns][32] of bfloat16: sixteen neighbouring positions of a row are then the left operand
// of every tap, at an address of its own, and nothing is copied for the taps. Where rows are not whole tiles, positions are
// counted on from row to row, and those that lie in the padding give outputs that are not written. With a stride, rows and
// columns of each remainder have a plane of their own.
//
// For 32 output channels, 32 positions at a time: all of the products, summed in tiles in the order of the packed weights,
// then bias, residual and moments. So an output is the same sum whatever block it is in, and whoever computes it.
//
// Threads have blocks of their own, or share them: the channels of the planes first, then the output channels.
#include "../conv_by_tiles.h"

#include "../conv_input.h"
#include "../faults.h"
#include "../isa.h"
#include "../matrix.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t DEEP = 2 * TILE;        // channels of a position in a plane
constexpr int64_t WIDEST = 128;           // columns of a block that has several rows
constexpr int64_t PLANES = 1 << 19;       // bytes of a block's planes: they stay in the second cache
constexpr int64_t POSITIONS = 512;        // of a block of one row, or of several images
constexpr int64_t APART = 5;              // positions more than needed, so that planes do not meet in the cache
constexpr int64_t FEW = 4, SOON = 1024;   // pairs of tiles, and words
constexpr int PANEL = Sizes<true>::PANEL;

int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct ConvByTiles {
  const ConvArguments& p;
  ConvInput input{p};
  int64_t images;                              // of all samples
  int64_t rows, columns, together;             // of a block: outputs, and whole images (1 where rows divide one)
  int64_t blocks_y, blocks_x;                  // of an image
  int64_t plane_rows, plane_columns;           // of one remainder
  int64_t remainder, image, plane;             // positions from one to the next
  int64_t units, panels;                       // of 32 channels and of the depth, of 32 outputs
  float* partial;

  explicit ConvByTiles(const ConvArguments& p) : p(p) {
    images = p.samples * p.out_depth;
    units = p.shape.depth * (p.shape.tap_stride() / DEEP);
    panels = ceil_divide(p.shape.out_channels, PANEL);
    // Nothing here depends on the number of samples or threads: neither do the parts whose moments are merged.
    columns = p.out_width;
    const int64_t widest = p.out_height == 1 ? POSITIONS : WIDEST;
    if (columns > widest) columns = ceil_divide(ceil_divide(columns, ceil_divide(columns, widest)), TILE) * TILE;
    rows = p.out_height;
    for (measure(); rows > 1 && units * image * DEEP * 2 > PLANES; measure()) rows = ceil_divide(rows, 2);
    blocks_y = ceil_divide(p.out_height, rows);
    blocks_x = ceil_divide(p.out_width, columns);
    together = 1;
    if (blocks_y * blocks_x == 1)
      while (together < images && 2 * together * rows * columns <= POSITIONS &&
             2 * together * units * image * DEEP * 2 <= PLANES)
        together *= 2;
    together = at_most(together, images);
    plane = together * image + TILE + APART;
  }

  void measure() {
    plane_rows = rows + (p.shape.height - 1) / p.stride_y;
    plane_columns = columns + (p.shape.width - 1) / p.stride_x;
    remainder = plane_rows * plane_columns;
    image = p.stride_y * p.stride_x * remainder;
  }

  int64_t blocks() const { return blocks_y * blocks_x * ceil_divide(images, together); }

  // How many blocks are worked on at a time, each by threads / so many.
  int64_t at_a_time(int64_t threads) const {
    int64_t best = 1, shortest = INT64_MAX;
    for (int64_t n = 1; n <= threads; ++n) {
      int64_t time = ceil_divide(blocks(), n) * ceil_divide(panels, threads / n);
      if (threads % n == 0 && time <= shortest) best = n, shortest = time;
    }
    return best;
  }

  // Where a block lies, of one image.
  struct Part {
    int64_t n, z, y, x, rows, columns;  // sample and image, first output and count
  };

  int64_t parts(int64_t block) const { return at_most(images - block / (blocks_x * blocks_y) * together, together); }

  Part part(int64_t block, int64_t i) const {
    int64_t x = block % blocks_x * columns, y = block / blocks_x % blocks_y * rows;
    int64_t at = block / (blocks_x * blocks_y) * together + i;
    return {at / p.out_depth, at % p.out_depth, y, x, at_most(p.out_height - y, rows), at_most(p.out_width - x, columns)};
  }

  // Tiles of a part: of each row, or of all positions from its first output to the last.
  static bool whole_rows(const Part& b) { return b.columns % TILE == 0; }
  int64_t tiles(const Part& b) const {
    if (whole_rows(b)) return b.rows * b.columns / TILE;
    return ceil_divide((b.rows - 1) * plane_columns + b.columns, TILE);
  }
  int64_t position(const Part& b, int64_t tile) const {
    if (!whole_rows(b)) return tile * TILE;
    int64_t of_row = b.columns / TILE;
    return tile / of_row * plane_columns + tile % of_row * TILE;
  }

  // ---- the planes

  // Where one image of a block is read, and its plane of the first unit.
  struct Reading {
    Window window;
    int64_t n, z;
    uint16_t* to;
  };

  Reading reading(const Part& b, int64_t i, int64_t d, uint16_t* planes) const {
    const int top = FAULT(paddings_swapped) ? p.left : p.top, left = FAULT(paddings_swapped) ? p.top : p.left;
    return {{b.y * step_y() - top, b.x * step_x() - left, (b.rows - 1) * step_y() + p.shape.height,
             (b.columns - 1) * step_x() + p.shape.width},
            b.n,
            b.z * (FAULT(depth_stride_missed) ? 1 : p.stride_z) - p.front + d + FAULT(depth_tap_one_off),
            planes + i * image * DEEP};
  }
  int64_t step_y() const { return FAULT(strides_swapped) ? p.stride_x : p.stride_y; }
  int64_t step_x() const { return FAULT(strides_swapped) ? p.stride_y : p.stride_x; }

  // Units [begin, end) of a block.
  void put(int64_t block, Share mine, uint16_t* planes) const {
    const int64_t of_image = p.shape.tap_stride() / DEEP;
    for (int64_t unit = mine.begin, here; unit < mine.end; unit += here) {
      const int64_t d = unit / of_image, first = unit % of_image;
      here = at_most(mine.end - unit, of_image - first);
      for (int64_t i = 0; i < parts(block); ++i) {
        Reading r = reading(part(block, i), i, d, planes + unit * plane * DEEP);
        if (!common()) put_any(r, first, here);
        else if (p.dtype == FLOAT32) put_common<FLOAT32>(r, first, here);
        else put_common<BFLOAT16>(r, first, here);
      }
    }
  }

  // Whole units of tensors, as most are.
  bool common() const {
    return LANES == BLOCK && p.dtype != FLOAT16 && !p.gate && p.resample != RESAMPLE_POOL && p.stride_y == 1 &&
           p.stride_x == 1 && p.h.channels % DEEP == 0 && p.skip.channels % DEEP == 0 && !FAULT(tail_of_channels_missed) &&
           !FAULT(padding_not_zero) && !FAULT(activation_of_padding) && !FAULT(padding_one_row_off) &&
           !FAULT(depth_edge_not_zero);
  }

  // `count` units from `first` on, position after position: memory is read from one end to the other.
  template <int DTYPE>
  void put_common(const Reading& r, int64_t first, int64_t count) const {
    const Window& w = r.window;
    const int up = p.resample == RESAMPLE_UP;
    const int64_t size = DTYPE == FLOAT32 ? 4 : 2, row = plane_columns * DEEP, next = plane * DEEP;
    const int64_t left = at_most(w.x < 0 ? -w.x : 0, w.columns), right = at_most(input.width() - w.x, w.columns);
    const int64_t of_h = p.h.channels / DEEP - first;  // units that are h's, of these
    const int64_t split = of_h < 0 ? 0 : at_most(of_h, count);
    auto clear = [&](int64_t y, int64_t begin, int64_t end) {
      for (int64_t u = 0; u < count; ++u) std_memset(r.to + u * next + y * row + begin * DEEP, (end - begin) * DEEP * 2);
    };
    for (int64_t y = 0; y < w.rows; ++y) {
      const int64_t from = w.y + y;
      if (r.z < 0 || r.z >= p.depth || from < 0 || from >= input.height() || right <= left) {
        clear(y, 0, w.columns);
        continue;
      }
      if (left > 0) clear(y, 0, left);
      if (right < w.columns) clear(y, right, w.columns);
      if (up && y > 0 && (from & 1)) {  // the row above is the same
        for (int64_t u = 0; u < count; ++u) {
          uint16_t* to = r.to + u * next + y * row + left * DEEP;
          __builtin_memcpy(to, to - row, (right - left) * DEEP * 2);
        }
        continue;
      }
      const int64_t line = first * DEEP;
      const char* h = (const char*)p.h.data + (p.h.image(r.n, r.z) + (from >> up) * p.h.y + line) * size;
      const char* skip =
          (const char*)p.skip.data + (p.skip.image(r.n, r.z) + (from >> up) * p.skip.y + line - p.h.channels) * size;
      for (int64_t x = left; x < right; ++x) {
        uint16_t* to = r.to + y * row + x * DEEP;
        const int64_t at = w.x + x;
        if (up && x > left && (at & 1)) {  // and so is the position before
          for (int64_t u = 0; u < count; ++u) __builtin_memcpy(to + u * next, to + u * next - DEEP, DEEP * 2);
          continue;
        }
        put_position<DTYPE>(h + (at >> up) * p.h.x * size, r.n, line, 0, split, to, next);
        put_position<DTYPE>(skip + (at >> up) * p.skip.x * size, r.n, line, split, count, to, next);
      }
    }
  }

  static void std_memset(void* to, int64_t bytes) { __builtin_memset(to, 0, bytes); }

  // Units [begin, end) of one position of sample n, of the channels from `line` on.
  template <int DTYPE>
  CMFAST_INLINE void put_position(const char* from, int64_t n, int64_t line, int64_t begin, int64_t end, uint16_t* to,
                                  int64_t next) const {
    const int64_t size = DTYPE == FLOAT32 ? 4 : 2, rows = n * p.channels() + line;
    const float *gain = p.gain ? p.gain + rows : nullptr, *offset = p.gain ? p.offset + rows : nullptr;
    const bool silus = p.silu;
    for (int64_t u = begin; u < end; ++u) {
      Floats x[DEEP / LANES];
      CMFAST_UNROLL
      for (int v = 0; v < DEEP / LANES; ++v) {
        const int64_t c = u * DEEP + v * LANES;
        x[v] = load(from + c * size, DTYPE, 0);
        if (gain) x[v] = x[v] * load(gain + c) + load(offset + c);
        if (silus) x[v] = silu(x[v]);
      }
      CMFAST_UNROLL
      for (int v = 0; v < DEEP / LANES; ++v) store_bfloat16(to + u * next + v * LANES, x[v]);
    }
  }

  void put_any(const Reading& r, int64_t first, int64_t count) const {
    const int64_t row = plane_columns * DEEP, along = step_y(), across = step_x();
    for (int64_t c = first * DEEP; c < (first + count) * DEEP; c += BLOCK) {
      uint16_t* to = r.to + (c / DEEP - first) * plane * DEEP + c % DEEP;
      input.read(r.window, r.n, r.z, c, [&](int64_t y, int64_t x, int64_t l, Floats value) __attribute__((always_inline)) {
        int64_t of = y % along * across + x % across;
        store_bfloat16(to + of * remainder * DEEP + y / along * row + x / across * DEEP + l, value);
      });
    }
  }

  // ---- the products

  // Where the taps of an image are read, from the first one on, in bytes.
  struct Taps {
    int64_t count;
    const int64_t* at;
  };

  void find_taps(int64_t* at) const {
    for (int64_t y = 0; y < p.shape.height; ++y)
      for (int64_t x = 0; x < p.shape.width; ++x) {
        int64_t of = y % p.stride_y * p.stride_x + x % p.stride_x;
        *at++ = (of * remainder + y / p.stride_y * plane_columns + x / p.stride_x) * (DEEP * 2);
      }
  }

  // Positions of two tiles whose outputs, and what is added to them, are fetched to the cache while their products are
  // taken: so many at a step.
  struct Outputs {
    const char *out[2], *added[2];
    int64_t out_next, added_next, step, left;

    CMFAST_INLINE void fetch() {
      if (left <= 0) return;
      left -= step;
      for (int64_t i = 0; i < step; ++i)
        CMFAST_UNROLL
        for (int half = 0; half < 2; ++half) {
          __builtin_prefetch(out[half], 1);
          if (added[half]) __builtin_prefetch(added[half]);
          out[half] += out_next;
          if (added[half]) added[half] += added_next;
        }
    }
  };

  // Of the tiles whose first positions are these, rows as if they were endless.
  Outputs outputs_of(int64_t block, const int64_t (&tile)[2], int64_t of_part, int64_t o, int64_t steps) const {
    const int64_t size = p.dtype == FLOAT32 ? 4 : 2;
    Outputs f{{}, {}, p.out.x * size, p.residual.x * size, ceil_divide(TILE, steps), TILE};
    const bool added = p.residual.data && p.residual_resample == RESAMPLE_NONE;
    for (int half = 0; half < 2; ++half) {
      const Part b = part(block, tile[half] / of_part);
      const int64_t at = position(b, tile[half] % of_part), y = b.y + at / plane_columns, x = b.x + at % plane_columns;
      f.out[half] = (const char*)p.out.data + (p.out.image(b.n, b.z) + y * p.out.y + x * p.out.x + o) * size;
      if (added)
        f.added[half] = (const char*)p.residual.data +
                        (p.residual.image(b.n, b.z) + y * p.residual.y + x * p.residual.x + o) * size;
    }
    return f;
  }

  template <int M, int V>
  __attribute__((noinline)) void multiply(const uint16_t* upper, const uint16_t* lower, Taps taps, const uint32_t* b,
                                          float* to, Ahead ahead, Outputs outputs) const {
    const Product product{to, PANEL, BLOCK, false};
    const char *above = (const char*)upper, *below = (const char*)lower;
    const int64_t step = plane * DEEP * 2;
    begin_tiles<M, V>(product);
    for (int64_t unit = 0; unit < units; ++unit, above += step, below += step)
      for (int64_t tap = 0; tap < taps.count; ++tap, b += TILE * TILE * V) {
        for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.from + i * 64, 0, 2);
        ahead.from += ahead.lines * 64;
        outputs.fetch();
        add_tiles<M, V>(above + taps.at[tap], below + taps.at[tap], b, 4 * TILE * V);
      }
    finish_tiles<M, V>(product);
  }

  // The sums of a panel's channels over a part.
  struct Sums {
    Moments of[PANEL / LANES];
    int64_t part;
  };

  // All outputs of a panel of a block.
  void multiply_panel(int64_t block, int64_t panel, const uint16_t* planes, Taps taps) const {
    const int64_t o = panel * PANEL, outputs = at_most(p.shape.out_channels - o, PANEL);
    const int64_t width = at_most(p.shape.columns() - o, PANEL), words = p.shape.words();
    const uint32_t* weights = p.weights + o * words;
    const int64_t of_part = tiles(part(block, 0)), count = of_part * parts(block);
    // Each product fetches its part of the next panel; where they are few, the first one what it reads itself a little later.
    const int64_t lines = words * width / TILE, pairs = ceil_divide(count, 2), steps = units * taps.count;
    const bool itself = pairs < FEW;
    const int64_t of_step = itself ? width : ceil_divide(lines, pairs * steps), fetched = steps * of_step * 64;
    const char* next = (const char*)(itself ? weights + SOON : weights + words * width);
    alignas(64) float products[2 * TILE * PANEL];
    Sums sums{{}, -1};
    for (int64_t t = 0; t < count; t += 2, next += fetched) {
      const Ahead ahead{next, itself && t > 0 ? 0 : of_step};
      const uint16_t* from[2];
      int64_t pair[2];
      for (int64_t i = 0, tile = t; i < 2; ++i) {
        from[i] = planes + (tile / of_part * image + position(part(block, tile / of_part), tile % of_part)) * DEEP;
        pair[i] = tile;
        if (tile + 1 < count) ++tile;
      }
      const Outputs fetched_outputs = outputs_of(block, pair, of_part, o, steps);
      const bool both = t + 1 < count, wide = width > TILE;
      if (both && wide) multiply<2, 2>(from[0], from[1], taps, weights, products, ahead, fetched_outputs);
      else if (both) multiply<2, 1>(from[0], from[1], taps, weights, products, ahead, fetched_outputs);
      else if (wide) multiply<1, 2>(from[0], from[1], taps, weights, products, ahead, fetched_outputs);
      else multiply<1, 1>(from[0], from[1], taps, weights, products, ahead, fetched_outputs);
      for (int64_t i = 0; i < 1 + both; ++i)
        write_tile(block, (t + i) / of_part, (t + i) % of_part, products + i * TILE * PANEL, o, outputs, sums);
    }
    if (partial) finish(block, sums, o, outputs);
  }

  // ---- the outputs

  // Of part i of a block: [2][Cout].
  float* slot(int64_t block, int64_t i) const {
    Part b = part(block, i);
    int64_t at = b.n * p.out_depth + b.z;
    return partial + ((at * blocks_y + b.y / rows) * blocks_x + b.x / columns) * 2 * p.shape.out_channels;
  }

  void finish(int64_t block, const Sums& sums, int64_t o, int64_t width) const {
    Part b = part(block, sums.part);
    float* to = slot(block, sums.part) + o;
    for (int64_t j = 0; j < width; j += LANES)
      sums.of[j / LANES].finish(to + j, to + p.shape.out_channels + j, b.rows * b.columns, (int)at_most(width - j, LANES));
  }

  // `width` channels from o on of a tile of part i, those of its positions that are outputs.
  void write_tile(int64_t block, int64_t i, int64_t tile, const float* from, int64_t o, int64_t width,
                  Sums& sums) const {
    Part b = part(block, i);
    bool first = sums.part != i;
    if (first && partial && sums.part >= 0) finish(block, sums, o, width);
    sums.part = i;
    if (FAULT(tail_of_outputs_missed)) width = width / LANES * LANES;
    int64_t at = position(b, tile), y = at / plane_columns, x = at % plane_columns;
    for (int64_t m = 0, count; m < TILE && y < b.rows; m += count, x += count) {
      int64_t left = b.columns - (FAULT(tile_edge_missed) && b.columns % TILE ? 1 : 0) - x;
      if (left <= 0) {
        count = at_most(plane_columns - x, TILE - m);  // in the padding
        if (x + count == plane_columns) x = -count, ++y;
        continue;
      }
      count = at_most(left, TILE - m);
      write(b, y, x, count, from + m * PANEL, o, width, first, sums);
      first = false;
      if (x + count == plane_columns) x = -count, ++y;
    }
  }

  // What a residual of another resolution, whose image begins at an element, adds to channels o on of output (y, x).
  CMFAST_INLINE Floats resampled(int64_t at, int64_t y, int64_t x, int64_t o, int lanes) const {
    const ConvTensor& r = p.residual;
    auto value = [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      return load(r.data, p.dtype, at + y * r.y + x * r.x + o, lanes);
    };
    if (FAULT(residual_not_resampled)) return value(y / 2, x);
    if (p.residual_resample == RESAMPLE_UP) return value(y / 2, x / 2);
    return 0.25f * ((value(2 * y, 2 * x) + value(2 * y, 2 * x + 1)) +
                    (value(2 * y + 1, 2 * x) + value(2 * y + 1, 2 * x + 1)));
  }

  // `count` outputs of row y of a part, from its column x on.
  void write(const Part& b, int64_t y, int64_t x, int64_t count, const float* from, int64_t o, int64_t width, bool first,
             Sums& sums) const {
    y += b.y, x += b.x;
    const int64_t image = p.residual.image(FAULT(residual_of_first_sample) ? 0 : b.n, b.z);
    const Place at{p.out.image(b.n, b.z) + y * p.out.y + x * p.out.x + o, image + y * p.residual.y + x * p.residual.x + o};
    const bool whole = width == PANEL && p.residual_resample == RESAMPLE_NONE && !FAULT(relu_before_residual);
    if (whole && p.dtype == FLOAT32) write_whole<FLOAT32>(at, count, from, o, first, sums);
    else if (whole && p.dtype == BFLOAT16) write_whole<BFLOAT16>(at, count, from, o, first, sums);
    else write_any(at, image, y, x, count, from, o, width, first, sums);
  }

  // Elements of the output and of what is added to it.
  struct Place {
    int64_t out, added;
  };

  // Of whole panels, the residual as it is.
  template <int DTYPE>
  void write_whole(Place at, int64_t count, const float* from, int64_t o, bool first, Sums& all_sums) const {
    constexpr int V = PANEL / LANES;
    void* const out = (void*)p.out.data;
    const void* const added = p.residual.data;
    const int64_t to_next = p.out.x, added_next = p.residual.x;
    Floats bias[V];
    Sums sums = all_sums;
    CMFAST_UNROLL
    for (int v = 0; v < V; ++v) bias[v] = p.bias ? load(p.bias + o + v * LANES) : zeros();
    for (int64_t i = 0; i < count; ++i, from += PANEL, at.out += to_next, at.added += added_next) {
      CMFAST_UNROLL
      for (int v = 0; v < V; ++v) {
        Floats value = load(from + v * LANES) + bias[v];
        if (added) value += load(added, DTYPE, at.added + v * LANES);
        if (p.relu) value = max(zeros(), value);  // NaN stays
        if (DTYPE == FLOAT32) store((float*)out + at.out + v * LANES, value);
        else store_bfloat16((uint16_t*)out + at.out + v * LANES, value);
        if (first && i == 0) sums.of[v].begin(value);
        sums.of[v].add(value);
      }
    }
    all_sums = sums;
  }

  void write_any(Place at, int64_t image, int64_t y, int64_t x, int64_t count, const float* from, int64_t o,
                 int64_t width, bool first, Sums& sums) const {
    const ConvTensor out = p.out, added = p.residual;
    const bool resample = added.data && p.residual_resample != RESAMPLE_NONE;
    for (int64_t j = 0; j < width; j += LANES) {
      const int lanes = (int)at_most(width - j, LANES);
      Floats bias = p.bias ? load(p.bias + o + j, lanes) : zeros();
      Moments moments = sums.of[j / LANES];
      for (int64_t i = 0; i < count; ++i) {
        Floats value = load(from + i * PANEL + j) + bias;
        if (p.relu && FAULT(relu_before_residual)) value = max(zeros(), value);
        if (resample) value += resampled(image, y, x + i, o + j, lanes);
        else if (added.data) value += load(added.data, p.dtype, at.added + i * added.x + j, lanes);
        if (p.relu && !FAULT(relu_before_residual)) value = max(zeros(), value);  // NaN stays
        store((void*)out.data, p.dtype, at.out + i * out.x + j, value, lanes);
        if (first && i == 0) moments.begin(value);
        moments.add(value);
      }
      sums.of[j / LANES] = moments;
    }
  }

  // ----

  int64_t elements_of(int64_t k) const {
    Part b = part(k % (blocks_y * blocks_x), 0);
    return b.rows * b.columns;
  }

  const char* run() {
    const int64_t operand = units * plane * DEEP, most = at_a_time(p.threads), area = p.shape.area();
    uint16_t* planes = (uint16_t*)scratch(SCRATCH_INPUT, most * operand * 2);
    int64_t* found = (int64_t*)scratch(SCRATCH_ROWS, area * 8);
    int64_t slots = images * blocks_y * blocks_x, of_sample = 2 * p.shape.out_channels;
    partial = p.moments ? (float*)scratch(SCRATCH_STATISTICS, slots * of_sample * 4) : nullptr;
    if (!planes || !found || (p.moments && !partial)) return "no memory for the operands";
    find_taps(found);
    const Taps taps{area, found};
    auto body = [&](Team team) {
      TileUse use;
      const int64_t groups = at_most(at_a_time(team.size), most), size = team.size / groups;
      const Team mine{(int)(team.rank % size), (int)size};  // who shares a block
      uint16_t* to = planes + at_most(team.rank / size, groups - 1) * operand;
      for (int64_t first = 0; first < blocks(); first += groups) {
        int64_t block = first + team.rank / size;
        const bool works = team.rank < groups * size && block < blocks();
        Share channels = share(units, mine), outputs = share(panels, mine);
        if (works) put(block, channels, to);
        if (size > 1) team.barrier();
        if (works)
          for (int64_t panel = outputs.begin; panel < outputs.end; ++panel) multiply_panel(block, panel, to, taps);
        if (size > 1) team.barrier();
      }
      if (!partial) return;
      team.barrier();
      Share samples = share(p.samples, team);
      int64_t each = (FAULT(moments_of_one_image) ? 1 : p.out_depth) * blocks_y * blocks_x;
      for (int64_t n = samples.begin; n < samples.end; ++n)
        merge_moments(partial + n * each * of_sample, each, p.shape.out_channels, 0, p.shape.out_channels,
                      [&](int64_t k) { return elements_of(k); }, p.moments + n * of_sample);
    };
    parallel(p.threads, body);
    return nullptr;
  }
};

}  // namespace

const char* conv_by_tiles(const ConvArguments& p) { return ConvByTiles(p).run(); }

}  // namespace CMFAST_ISA
}  // namespace cmfast
