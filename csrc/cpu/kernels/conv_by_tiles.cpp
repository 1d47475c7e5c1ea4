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
constexpr int64_t WEIGHTS = 1 << 19;      // bytes of a panel's weights that meet all tiles together
constexpr int64_t FEW = 4, SOON = 1024;   // pairs of tiles, and words
constexpr int64_t GROUP = 16;             // tiles whose moments are taken together
constexpr int PANEL = Sizes<true>::PANEL;

int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
int64_t ceil_divide(int64_t x, int64_t y) { return (x + y - 1) / y; }

// TERMS: of each operand, 2 where they are split.
template <int TERMS>
struct ConvByTiles {
  static constexpr int64_t POSITION = TERMS * DEEP * 2;  // bytes

  const ConvArguments& p;
  ConvInput input{p};
  int64_t images;                              // of all samples
  int64_t rows, columns, together;             // of a block: outputs, and whole images (1 where rows divide one)
  int64_t blocks_y, blocks_x;                  // of an image
  int64_t plane_rows, plane_columns;           // of one remainder
  int64_t remainder, image, plane;             // positions from one to the next; each term has planes of its own
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
    for (measure(); rows > 1 && units * image * POSITION > TERMS * PLANES; measure()) rows = ceil_divide(rows, 2);
    blocks_y = ceil_divide(p.out_height, rows);
    blocks_x = ceil_divide(p.out_width, columns);
    together = 1;
    if (blocks_y * blocks_x == 1)
      while (together < images && 2 * together * rows * columns <= POSITIONS &&
             2 * together * units * image * POSITION <= TERMS * PLANES)
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
        Reading r = reading(part(block, i), i, d, planes + unit * TERMS * plane * DEEP);
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
    const int64_t size = DTYPE == FLOAT32 ? 4 : 2, row = plane_columns * DEEP, next = plane * DEEP;  // from term to term
    const int64_t terms = TERMS * count;
    const int64_t left = at_most(w.x < 0 ? -w.x : 0, w.columns), right = at_most(input.width() - w.x, w.columns);
    const int64_t of_h = p.h.channels / DEEP - first;  // units that are h's, of these
    const int64_t split = of_h < 0 ? 0 : at_most(of_h, count);
    auto clear = [&](int64_t y, int64_t begin, int64_t end) {
      for (int64_t u = 0; u < terms; ++u) __builtin_memset(r.to + u * next + y * row + begin * DEEP, 0, (end - begin) * DEEP * 2);
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
        for (int64_t u = 0; u < terms; ++u) {
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
          for (int64_t u = 0; u < terms; ++u) __builtin_memcpy(to + u * next, to + u * next - DEEP, DEEP * 2);
          continue;
        }
        put_position<DTYPE>(h + (at >> up) * p.h.x * size, r.n, line, 0, split, to, next);
        put_position<DTYPE>(skip + (at >> up) * p.skip.x * size, r.n, line, split, count, to, next);
      }
    }
  }

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
      for (int v = 0; v < DEEP / LANES; ++v) put_terms(to + u * TERMS * next + v * LANES, x[v]);
    }
  }

  CMFAST_INLINE void put_terms(uint16_t* to, Floats x) const {
    store_bfloat16(to, x);
    if (TERMS == 2) store_bfloat16(to + plane * DEEP, FAULT(low_terms_missed) ? zeros() : x - high_term(x));
  }

  void put_any(const Reading& r, int64_t first, int64_t count) const {
    const int64_t row = plane_columns * DEEP, along = step_y(), across = step_x();
    for (int64_t c = first * DEEP; c < (first + count) * DEEP; c += BLOCK) {
      uint16_t* to = r.to + (c / DEEP - first) * TERMS * plane * DEEP + c % DEEP;
      input.read(r.window, r.n, r.z, c, [&](int64_t y, int64_t x, int64_t l, Floats value) __attribute__((always_inline)) {
        int64_t of = FAULT(remainders_missed) ? 0 : y % along * across + x % across;
        put_terms(to + of * remainder * DEEP + y / along * row + x / across * DEEP + l, value);
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

  // Elements of an output and of what is added to it, before the channels; out is -1 where a position is none.
  struct Place {
    int64_t out, added;
  };

  // What is the same for all panels of a block: of each tile, where it is read, and the places of its positions.
  struct Tiles {
    const uint16_t** from;
    Place* places;  // [tiles][TILE]
    int64_t count, of_part;
  };

  int64_t most_tiles() const { return together * ceil_divide(rows * plane_columns, TILE); }
  int64_t bytes_of_products() const {
    int64_t pairs = units_together() < units ? ceil_divide(most_tiles(), 2) : 2;
    return pairs * (2 * TILE * PANEL * 4);
  }
  int64_t bytes_of_tiles() const {
    int64_t each = sizeof(uint16_t*) + TILE * sizeof(Place);
    return bytes_of_products() + ceil_divide(most_tiles() * each, 64) * 64;
  }

  Tiles find_tiles(int64_t block, const uint16_t* planes, void* memory) const {
    Tiles found{(const uint16_t**)memory, (Place*)((const uint16_t**)memory + most_tiles()), 0, tiles(part(block, 0))};
    for (int64_t i = 0; i < parts(block); ++i) {
      const Part b = part(block, i);
      const int64_t image_out = p.out.image(b.n, b.z);
      const int64_t image_added = p.residual.image(FAULT(residual_of_first_sample) ? 0 : b.n, b.z);
      const int64_t wide = b.columns - (FAULT(tile_edge_missed) && b.columns % TILE ? 1 : 0);
      for (int64_t tile = 0; tile < found.of_part; ++tile, ++found.count) {
        int64_t at = position(b, tile), y = at / plane_columns, x = at % plane_columns;
        found.from[found.count] = planes + (i * image + at) * DEEP;
        for (int64_t m = 0; m < TILE; ++m) {
          const bool is_output = x < wide && y < b.rows;
          found.places[found.count * TILE + m] = {
              is_output ? image_out + (b.y + y) * p.out.y + (b.x + x) * p.out.x : -1,
              image_added + of_residual(b.y + y) * p.residual.y + of_residual(b.x + x) * p.residual.x};
          if (++x == plane_columns) x = 0, ++y;
        }
      }
    }
    return found;
  }

  int64_t of_residual(int64_t i) const {
    if (p.residual_resample == RESAMPLE_POOL) return 2 * i;
    return p.residual_resample == RESAMPLE_UP && !FAULT(residual_not_resampled) ? i / 2 : i;
  }

  // How outputs are written: whole panels of one dtype, or any.
  enum Kind { WHOLE_FLOAT32, WHOLE_BFLOAT16, ANY };

  // Adds bias and residual to the products of up to two tiles and writes them, so many positions at a time: while the
  // next two tiles are multiplied.
  template <Kind KIND>
  struct Writer {
    const ConvByTiles& conv;
    int64_t block, o, width, of_part;
    const float* from;    // products [2 * TILE][PANEL]
    const Place* places;
    int64_t tile, i, end;  // the first tile; the next position, and their number
    int64_t part, group;   // of the sums
    bool begun;
    Moments sums[PANEL / LANES];

    CMFAST_INLINE void some(int64_t count) {
      for (; count > 0 && i < end; --count, ++i) {
        if (i % TILE == 0) begin_tile();
        if (places[i].out >= 0) position(from + i * PANEL, places[i]);
      }
    }

    void begin_tile() {
      const int64_t at = tile + i / TILE, now = at % of_part / GROUP;
      if (at / of_part == part && now == group) return;
      finish();
      part = at / of_part, group = now, begun = false;
    }

    void finish() const {
      if (!conv.partial || part < 0) return;
      const Part b = conv.part(block, part);
      float* to = conv.slot(block, part, group) + o;
      for (int64_t j = 0; j < width; j += LANES)
        sums[j / LANES].finish(to + j, to + conv.p.shape.out_channels + j, conv.elements(b, group),
                               (int)at_most(width - j, LANES));
    }

    CMFAST_INLINE void position(const float* products, const Place& at) {
      const ConvArguments& p = conv.p;
      const int dtype = KIND == WHOLE_FLOAT32 ? (int)FLOAT32 : KIND == WHOLE_BFLOAT16 ? (int)BFLOAT16 : p.dtype;
      CMFAST_UNROLL
      for (int v = 0; v < PANEL / LANES; ++v) {
        const int64_t c = o + v * LANES;
        const int lanes = KIND != ANY ? LANES : (int)at_most(width - v * LANES, LANES);
        if (KIND == ANY && lanes <= 0) break;
        Floats value = load(products + v * LANES);
        if (p.bias) value += load(p.bias + c, FLOAT32, 0, lanes);
        if (p.relu && FAULT(relu_before_residual)) value = max(zeros(), value);
        if (p.residual.data) value += residual(at.added + c, dtype, lanes);
        if (p.relu && !FAULT(relu_before_residual)) value = max(zeros(), value);  // NaN stays
        if (KIND == WHOLE_BFLOAT16) store_bfloat16((uint16_t*)p.out.data + at.out + c, value);
        else store((void*)p.out.data, dtype, at.out + c, value, lanes);
        if (!conv.partial) continue;
        if (!begun) sums[v].begin(value);
        sums[v].add(value);
      }
      begun = true;
    }

    CMFAST_INLINE Floats residual(int64_t at, int dtype, int lanes) const {
      const ConvTensor& r = conv.p.residual;
      auto value = [&](int64_t i) __attribute__((always_inline)) { return load(r.data, dtype, i, lanes); };
      if (KIND != ANY || conv.p.residual_resample != RESAMPLE_POOL || FAULT(residual_not_resampled)) return value(at);
      return 0.25f * ((value(at) + value(at + r.x)) + (value(at + r.y) + value(at + r.y + r.x)));
    }
  };

  // Add the products of `count` units to those of two tiles, or begin with them.
  template <int M, int V, Kind KIND>
  __attribute__((noinline)) void multiply(const uint16_t* upper, const uint16_t* lower, int64_t count, bool begins,
                                          Taps taps, const uint32_t* b, float* to, Ahead ahead, const Place* places,
                                          Writer<KIND>& before) const {
    const Product product{to, PANEL, BLOCK, !begins};
    const char *above = (const char*)upper, *below = (const char*)lower;
    const int64_t low = plane * DEEP * 2, next = TERMS * low, size = p.dtype == FLOAT32 ? 4 : 2, step = ceil_divide(2 * TILE, count * taps.count);
    const char *out = (const char*)p.out.data + before.o * size, *added = (const char*)p.residual.data + before.o * size;
    int64_t fetched = places ? 0 : M * TILE;
    begin_tiles<M, V>(product);
    for (int64_t unit = 0; unit < count; ++unit, above += next, below += next)
      for (int64_t tap = 0; tap < taps.count; ++tap, b += TERMS * TILE * TILE * V) {
        for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.from + i * 64, 0, 2);
        ahead.from += ahead.lines * 64;
        const char *over = above + taps.at[tap], *under = below + taps.at[tap];
        if (TERMS == 1) add_tiles<M, V>(over, under, b, 4 * TILE * V);
        else add_split_tiles<M, V>(over, under, low, (const char*)b, 4 * TILE * V);
        before.some(step);
        for (int64_t i = 0; i < step && fetched < M * TILE; ++i, ++fetched) {
          const Place at = places[fetched];
          __builtin_prefetch(out + at.out * size, 1);
          if (size == 4) __builtin_prefetch(out + at.out * size + 64, 1);
          if (!p.residual.data) continue;
          __builtin_prefetch(added + at.added * size);
          if (size == 4) __builtin_prefetch(added + at.added * size + 64);
        }
      }
    finish_tiles<M, V>(product);
    before.some(2 * TILE);
  }

  void multiply_panel(int64_t block, int64_t panel, const Tiles& tiles, Taps taps, float* products) const {
    const bool whole = (panel + 1) * PANEL <= p.shape.out_channels && p.residual_resample == RESAMPLE_NONE;
    if (whole && p.dtype == FLOAT32) multiply_panel<WHOLE_FLOAT32>(block, panel, tiles, taps, products);
    else if (whole && p.dtype == BFLOAT16) multiply_panel<WHOLE_BFLOAT16>(block, panel, tiles, taps, products);
    else multiply_panel<ANY>(block, panel, tiles, taps, products);
  }

  // Units whose weights are multiplied with all tiles of a block before the next ones are: they stay in the second cache.
  int64_t units_together() const {
    const int64_t most = WEIGHTS / (p.shape.area() * TERMS * TERMS * TILE * PANEL * 4);
    return ceil_divide(units, ceil_divide(units, most > 1 ? most : 1));
  }

  // All outputs of a panel of a block; `products` has room for two pairs of tiles, or for all where units are divided.
  template <Kind KIND>
  void multiply_panel(int64_t block, int64_t panel, const Tiles& tiles, Taps taps, float* products) const {
    const int64_t o = panel * PANEL, width = at_most(p.shape.columns() - o, PANEL);
    int64_t outputs = at_most(p.shape.out_channels - o, PANEL);
    if (FAULT(tail_of_outputs_missed)) outputs = outputs / LANES * LANES;
    const uint32_t* weights = p.weights + o * p.shape.words();
    const int64_t most = units_together(), pairs = ceil_divide(tiles.count, 2), of_unit = taps.count * TERMS * TILE * width;
    const bool few = pairs < FEW, wide = width > TILE;
    Writer<KIND> writer{*this, block, o, outputs, tiles.of_part, nullptr, nullptr, 0, 0, 0, -1, 0, false, {}};
    for (int64_t unit = 0, count; unit < units; unit += count, weights += count * of_unit) {
      count = at_most(units - unit, most);
      // Each product fetches its part of the next weights. Where they are few, memory is waited for: the first one fetches
      // what it reads itself a little later, and the others as much as does not hold them up.
      const int64_t steps = count * taps.count, lines = count * of_unit / TILE;
      const int64_t of_step = few ? 4 : ceil_divide(lines, pairs * steps);
      const char* next = (const char*)(weights + count * of_unit);
      const bool last = unit + count == units;
      for (int64_t t = 0; t < tiles.count; t += 2) {
        const bool itself = few && t == 0, both = t + 1 < tiles.count;
        const Ahead ahead = itself ? Ahead{(const char*)(weights + SOON), TERMS * width} : Ahead{next, of_step};
        if (!itself) next += steps * of_step * 64;
        const int64_t from = unit * TERMS * plane * DEEP;
        const uint16_t *upper = tiles.from[t] + from, *lower = tiles.from[t + both] + from;
        float* to = products + (most < units ? t / 2 : t / 2 % 2) * (2 * TILE * PANEL);
        const Place* places = last ? tiles.places + t * TILE : nullptr;
        const bool begins = unit == 0 || FAULT(later_units_missed);
        if (both && wide) multiply<2, 2>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        else if (both) multiply<2, 1>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        else if (wide) multiply<1, 2>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        else multiply<1, 1>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        if (last) writer.from = to, writer.places = places, writer.tile = t, writer.i = 0, writer.end = (1 + both) * TILE;
      }
    }
    writer.some(2 * TILE);
    writer.finish();
  }

  // Groups of tiles of a part, and where the moments [2][Cout] of one of part i of a block are.
  int64_t groups_of_part() const { return ceil_divide(ceil_divide(rows * plane_columns, TILE), GROUP); }
  float* slot(int64_t block, int64_t i, int64_t group) const {
    Part b = part(block, i);
    int64_t at = b.n * p.out_depth + b.z;
    at = (at * blocks_y + b.y / rows) * blocks_x + b.x / columns;
    return partial + (at * groups_of_part() + group) * 2 * p.shape.out_channels;
  }

  // Outputs of a group of tiles of a part, none beyond the last of them.
  int64_t elements(const Part& b, int64_t group) const {
    auto before = [&](int64_t tile) {
      if (whole_rows(b)) return at_most(tile * TILE, b.rows * b.columns);
      int64_t at = tile * TILE;
      return at_most(at / plane_columns * b.columns + at_most(at % plane_columns, b.columns), b.rows * b.columns);
    };
    return before((group + 1) * GROUP) - before(group * GROUP);
  }

  // ----

  int64_t elements_of(int64_t k) const { return elements(part(k / groups_of_part() % (blocks_y * blocks_x), 0), k % groups_of_part()); }

  const char* run() {
    const int64_t operand = units * TERMS * plane * DEEP, most = at_a_time(p.threads), area = p.shape.area();
    uint16_t* planes = (uint16_t*)scratch(SCRATCH_INPUT, most * operand * 2);
    int64_t* found = (int64_t*)scratch(SCRATCH_ROWS, area * 8);
    char* found_tiles = (char*)scratch(SCRATCH_PRODUCTS, p.threads * bytes_of_tiles());
    int64_t slots = images * blocks_y * blocks_x * groups_of_part(), of_sample = 2 * p.shape.out_channels;
    partial = p.moments ? (float*)scratch(SCRATCH_STATISTICS, slots * of_sample * 4) : nullptr;
    if (!planes || !found || !found_tiles || (p.moments && !partial)) return "no memory for the operands";
    find_taps(found);
    const Taps taps{area, found};
    auto body = [&](Team team) {
      TileUse use;
      const int64_t groups = at_most(at_a_time(team.size), most), size = team.size / groups;
      const Team mine{(int)(team.rank % size), (int)size};  // who shares a block
      float* products = (float*)(found_tiles + team.rank * bytes_of_tiles());
      void* memory = (char*)products + bytes_of_products();
      uint16_t* to = planes + at_most(team.rank / size, groups - 1) * operand;
      for (int64_t first = 0; first < blocks(); first += groups) {
        int64_t block = first + team.rank / size;
        const bool works = team.rank < groups * size && block < blocks();
        Share channels = share(units, mine), outputs = share(panels, mine);
        if (works) put(block, channels, to);
        if (size > 1) team.barrier();
        if (works) {
          const Tiles tiles = find_tiles(block, to, memory);
          for (int64_t panel = outputs.begin; panel < outputs.end; ++panel) multiply_panel(block, panel, tiles, taps, products);
        }
        if (size > 1) team.barrier();
      }
      if (!partial) return;
      team.barrier();
      Share samples = share(p.samples, team);
      int64_t each = (FAULT(moments_of_one_image) ? 1 : p.out_depth) * blocks_y * blocks_x * groups_of_part();
      for (int64_t n = samples.begin; n < samples.end; ++n)
        merge_moments(partial + n * each * of_sample, each, p.shape.out_channels, 0, p.shape.out_channels,
                      [&](int64_t k) { return elements_of(k); }, p.moments + n * of_sample);
    };
    parallel(p.threads, body);
    return nullptr;
  }
};

}  // namespace

const char* conv_by_tiles(const ConvArguments& p) {
  return p.shape.split() ? ConvByTiles<2>(p).run() : ConvByTiles<1>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
