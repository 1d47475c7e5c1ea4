// Convolution of channels-last tensors, as a few matrix products of a block of tiles with the packed weights.
//
// An output image is a sum of convolutions of input images, one for each tap of the kernel along the depth: their channels
// are further input channels, and their sum is taken where that of the channels is. Without a depth there is one tap.
//
// A tile is m × m outputs of Winograd's F(m×m, 3×3), or one output of the direct form. For a block of tiles:
//   1. Sixteen channels of the rows under the tiles are read into a strip, where activation, resampling and padding are
//      done. Of each tile, Winograd's points or the direct form's taps are stored as left operands, eight tiles together.
//   2. For 48 output channels, each point's product, with weights that are packed transformed or are transformed here;
//      then the tiles' outputs, to which bias and residual are added.
// The direct form has one point, whose sums run over taps and channels.
//
// Threads have blocks of their own where there are enough of them. Else, with few tiles and much weight, they share a
// block: its channels in the first step, its output channels in the second; so the weights are read once.
#include "../conv_by_tiles.h"
#include "../conv_input.h"
#include "../conv_weights.h"
#include "../faults.h"
#include "../image_blocks.h"
#include "../integers.h"
#include "../isa.h"
#include "../matrix.h"
#include "../pointwise.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"
#include "../winograd.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t WIDEST = 16;         // tiles of a row in a block, where there are rows enough to make it large
constexpr int64_t MANY = 1024;         // tiles of an image whose moments are taken of several rows of tiles together
constexpr int64_t LINE = 16;           // floats of a cache line
constexpr int64_t SMALL = 1 << 19;     // products of words that one thread takes sooner than two

// M: outputs a side of a tile, 1 for the direct form.
template <int M, bool PAIRS>
struct Convolution : Sizes<PAIRS>, ImageBlocks {
  using Sizes<PAIRS>::ROWS, Sizes<PAIRS>::PANEL, Sizes<PAIRS>::LONGEST_SUM;
  static constexpr int SIDE = M == 1 ? 1 : M + 2, POINTS = SIDE * SIDE;
  static constexpr int64_t WORD = PAIRS ? 2 : 1;
  // So many words of the weights meet all tiles before the next ones do: those that stay in the first cache. Of Winograd's
  // points all do: what their products are added to would be farther away.
  static constexpr int64_t STEP = M == 1 ? LONGEST_SUM : int64_t(1) << 40;

  const ConvArguments& p;
  ConvInput input{p};
  int64_t part_rows, part_columns;       // of what the moments of a channel are taken of together
  int64_t parts_y, parts_x;              // such parts of an image
  int64_t tiles;                         // of a block, whole rows of the left operand
  int64_t words, blocks_k;               // of a product
  int threads;
  int64_t point_stride, strip_floats;
  float *points, *products, *made, *strips, *partial;

  explicit Convolution(const ConvArguments& p) : p(p) {
    images = p.samples * p.out_depth;
    per_sample = p.out_depth;
    image_rows = ceil_divide(p.out_height, M);  // of tiles
    image_columns = ceil_divide(p.out_width, M);
    words = p.shape.words();
    blocks_k = ceil_divide(words, BLOCK);
    threads = images * image_rows * image_columns * POINTS * words * p.shape.columns() < SMALL ? 1 : p.threads;
    // So many tiles that the weights are used often once they are in the cache, and few enough to keep the points near.
    constexpr int64_t wanted = M == 4 ? 32 : 64;
    columns = at_most(image_columns, at_least(wanted / image_rows / WIDEST, 1) * WIDEST);
    rows = at_most(image_rows, ceil_divide(wanted, columns));
    together = rows < image_rows ? 1 : at_most(images, at_least(wanted / (image_rows * columns), 1));
    // The same parts whatever the number of threads and samples, for the same bits. They divide the blocks.
    part_rows = M == 1 && image_rows * image_columns > MANY ? rows : 1;
    part_columns = at_most(columns, WIDEST);
    auto divisible = [&] { return together > 1 || rows > part_rows || columns > part_columns; };
    for (divide(); !shared() && blocks() < threads && divisible(); divide()) {
      if (together > 1) together = ceil_divide(together, 2);
      else if (rows > part_rows) rows = ceil_divide(rows, 2);
      else columns = round_up(ceil_divide(columns, 2), part_columns);
    }
    parts_y = ceil_divide(image_rows, part_rows);
    parts_x = ceil_divide(image_columns, part_columns);
    tiles = round_up(together * rows * columns, ROWS);
    // A few lines more than needed: points a power of two apart would meet in the same sets of the cache.
    point_stride = tiles * blocks_k * BLOCK + 5 * LINE;
    strip_floats = strip_rows(rows) * strip_columns(columns) * BLOCK;
  }

  // From tile to tile in the input.
  CMFAST_INLINE int64_t step_y() const { return M > 1 ? M : FAULT(strides_swapped) ? p.stride_x : p.stride_y; }
  CMFAST_INLINE int64_t step_x() const { return M > 1 ? M : FAULT(strides_swapped) ? p.stride_y : p.stride_x; }

  // What so many tiles cover of the input.
  int64_t strip_rows(int64_t tiles) const { return (tiles - 1) * step_y() + (M > 1 ? SIDE : p.shape.height); }
  int64_t strip_columns(int64_t tiles) const { return (tiles - 1) * step_x() + (M > 1 ? SIDE : p.shape.width); }

  int64_t panels() const { return ceil_divide(p.shape.out_channels, PANEL); }

  // Whether the threads share each block.
  bool shared() const {
    return threads > 1 && panels() >= threads && blocks() % threads && blocks() < 4 * threads;
  }

  // ---- the left operands

  // A register of element k of a tile's row of a point.
  CMFAST_INLINE void put(float* to, int64_t tile, int64_t k, Floats x) const {
    if (PAIRS) store_bfloat16((uint16_t*)to + (k / 32 * ROWS + tile % ROWS) * 32 + k % 32, x);
    else store(to + (k / BLOCK * ROWS + tile % ROWS) * BLOCK + k % BLOCK, x);
  }

  CMFAST_INLINE void put_tile(const float* from, int64_t columns, float* to, int64_t tile, int64_t first_k) const {
    to += tile / ROWS * blocks_k * (ROWS * BLOCK);
    const int64_t stride = point_stride;  // the compiler does not know that no store changes it
    for (int64_t l = 0; l < BLOCK; l += LANES) {
      if constexpr (M == 1) {
        const int64_t height = p.shape.height, width = p.shape.width, tap = p.shape.tap_stride();
        for (int64_t y = 0, k = first_k + l; y < height; ++y)
          for (int64_t x = 0; x < width; ++x, k += tap) put(to, tile, k, load(from + (y * columns + x) * BLOCK + l));
      } else {
        Floats half[POINTS];
        CMFAST_UNROLL
        for (int x = 0; x < SIDE; ++x) {
          Floats column[SIDE];
          CMFAST_UNROLL
          for (int y = 0; y < SIDE; ++y) column[y] = load(from + (y * columns + x) * BLOCK + l);
          Winograd<M>::input(column, 1, half + x, SIDE);
        }
        CMFAST_UNROLL
        for (int y = 0; y < SIDE; ++y) {
          Floats row[SIDE];
          Winograd<M>::input(half + y * SIDE, 1, row, 1);
          CMFAST_UNROLL
          for (int x = 0; x < SIDE; ++x) put(to + (y * SIDE + x) * stride, tile, first_k + l, row[x]);
        }
      }
    }
  }

  // Channels from c on, 16 of them, of all tiles of a block, for each tap along the depth.
  void put_channels(int64_t block, int64_t c, float* strip, float* to) const {
    const int top = FAULT(paddings_swapped) ? p.left : p.top, left = FAULT(paddings_swapped) ? p.top : p.left;
    const int64_t step_k = p.shape.taps() / p.shape.depth * p.shape.tap_stride();  // from image to image
    for (int64_t i = 0, tile = 0; i < parts(block); ++i) {
      Part b = part(block, i);
      Window s{b.y * step_y() - top, b.x * step_x() - left, strip_rows(b.rows), strip_columns(b.columns)};
      auto keep = [&](int64_t y, int64_t x, int64_t l, Floats value) __attribute__((always_inline)) {
        store(strip + (y * s.columns + x) * BLOCK + l, value);
      };
      int64_t z = b.z * (FAULT(depth_stride_missed) ? 1 : p.stride_z) - p.front + FAULT(depth_tap_one_off);
      for (int64_t d = 0; d < p.shape.depth; ++d) {
        input.read(s, b.n, z + d, c, keep);
        int64_t at = tile;
        for (int64_t y = 0; y < b.rows; ++y)
          for (int64_t x = 0; x < b.columns; ++x, ++at)
            put_tile(strip + (y * step_y() * s.columns + x * step_x()) * BLOCK, s.columns, to, at, d * step_k + c);
      }
      tile += b.rows * b.columns;
    }
  }

  // ---- the products

  int64_t tiles_in(int64_t block) const {
    Part b = part(block, 0);
    return parts(block) * b.rows * b.columns;
  }

  // The outputs of a panel that are still to be fetched to the cache, with what is added to them, while its products
  // are taken: so many pixels a time.
  struct Outputs {
    int64_t o, width, step;
    int64_t i, parts;
    Part b;
    int64_t y, x;  // of the next pixel within the part
  };

  CMFAST_INLINE void fetch(int64_t block, Outputs& f) const {
    const int64_t size = p.dtype == FLOAT32 ? 4 : 2, line = 64 / size;
    bool added = p.residual.data && p.residual_resample == RESAMPLE_NONE;
    for (int64_t left = f.step; left > 0 && f.i < f.parts; --left) {
      int64_t y = f.b.y * M + f.y, x = f.b.x * M + f.x;
      if (y < p.out_height && x < p.out_width) {
        int64_t to = p.out.image(f.b.n, f.b.z) + y * p.out.y + x * p.out.x + f.o;
        int64_t at = p.residual.image(f.b.n, f.b.z) + y * p.residual.y + x * p.residual.x + f.o;
        for (int64_t o = 0; o < f.width; o += line) {
          __builtin_prefetch((const char*)p.out.data + (to + o) * size, 1);
          if (added) __builtin_prefetch((const char*)p.residual.data + (at + o) * size, 0, 2);
        }
      }
      if (++f.x < f.b.columns * M) continue;
      f.x = 0;
      if (++f.y < f.b.rows * M) continue;
      f.y = 0;
      if (++f.i < f.parts) f.b = part(block, f.i);
    }
  }

  // A point's products of `count` words from k on with all tiles. Meanwhile so many lines from `next` on are fetched.
  CMFAST_INLINE void multiply_point(int64_t block, int64_t used, int point, int64_t k, int64_t count, const float* from,
                                    const uint32_t* weights, int width, float* to, const char* next, int64_t lines,
                                    Outputs& outputs) const {
    int64_t ahead = ceil_divide(lines, ceil_divide(used, ROWS) * ceil_divide(count, BLOCK));  // for each block of k
    for (int64_t end = k + count, here; k < end; k += here, weights += here * width) {
      here = at_most(end - k, STEP);
      bool accumulate = k > 0 && !FAULT(first_kernels_missed);
      for (int64_t tile = 0; tile < used; tile += ROWS, next += ceil_divide(here, BLOCK) * ahead * 64) {
        const uint32_t* rows = (const uint32_t*)(from + point * point_stride + tile * blocks_k * BLOCK + k * ROWS);
        Product product{to + (tile * POINTS + point) * PANEL, POINTS * PANEL, BLOCK, accumulate};
        if (used - tile <= ROWS / 2)
          multiply_panel<PAIRS, 4>(rows, weights, width, here, product, {next, ahead}, ROWS / 2);
        else multiply_panel<PAIRS>(rows, weights, width, here, product, {next, ahead});
        fetch(block, outputs);
      }
    }
  }

  // The products of a panel's weights with a block's points: [tiles][points][PANEL].
  void multiply(int64_t block, int64_t panel, const float* from, float* made, float* to) const {
    int width = (int)at_most(p.shape.columns() - panel * PANEL, PANEL);
    const uint32_t* weights = p.weights + panel * PANEL * p.shape.stored() * words;
    int64_t used = tiles_in(block), parts_k = ceil_divide(words, made ? MADE_WORDS : STEP);
    int64_t o = panel * PANEL, products = POINTS * ceil_divide(used, ROWS) * parts_k;
    int64_t step = ceil_divide(used * M * M, products);
    Outputs outputs{o, at_most(p.shape.out_channels - o, PANEL), step, 0, parts(block), part(block, 0), 0, 0};
    if (!made) {
      for (int point = 0; point < POINTS; ++point, weights += words * width)
        multiply_point(block, used, point, 0, words, from, weights, width, to, (const char*)(weights + words * width),
                       words * width / LINE, outputs);
      return;
    }
    if constexpr (M > 1 && !PAIRS)
      for (int64_t k = 0, count; k < words; k += count, weights += 9 * count * width) {
        count = at_most(words - k, MADE_WORDS);
        transform_weights<M>((const float*)weights, count - FAULT(tail_of_kernels_missed), width, made);
        int64_t lines = ceil_divide(9 * count * width / LINE, POINTS);  // of the next kernels
        for (int point = 0; point < POINTS; ++point)
          multiply_point(block, used, point, k, count, from, (const uint32_t*)(made + point * MADE_STRIDE), width, to,
                         (const char*)(weights + 9 * count * width) + point * lines * 64, lines, outputs);
      }
  }

  // ---- the outputs

  // What a residual of another resolution, whose image begins at an element, adds to channels o on of output (y, x).
  CMFAST_INLINE Floats resampled(const ConvTensor& r, int resample, int dtype, int64_t image, int64_t y, int64_t x,
                                 int64_t o, int lanes) const {
    auto at = [&](int64_t y, int64_t x) __attribute__((always_inline)) {
      return load(r.data, dtype, image + y * r.y + x * r.x + o, lanes);
    };
    if (FAULT(residual_not_resampled)) return at(y / 2, x);
    if (resample == RESAMPLE_UP) return at(y / 2, x / 2);
    return 0.25f * ((at(2 * y, 2 * x) + at(2 * y, 2 * x + 1)) + (at(2 * y + 1, 2 * x) + at(2 * y + 1, 2 * x + 1)));
  }

  // Where an image begins in the output and in what is added to it.
  struct Image {
    int64_t out, added;
  };

  // Channels o on, `lanes` of them, of the outputs of one tile. WHOLE: all of its outputs are there.
  template <bool WHOLE>
  CMFAST_INLINE void write_tile(Image image, int64_t ty, int64_t tx, const float* m, int64_t o, int dtype, int lanes,
                                bool first, Moments& moments) const {
    // Copies, which the compiler knows that no store changes.
    const ConvTensor out = p.out, added = p.residual;
    const int resample = p.residual_resample;
    Moments sums = moments;
    Floats y[M * M];
    if constexpr (M == 1) {
      y[0] = load(m);
    } else {
      Floats half[M * SIDE];
      CMFAST_UNROLL
      for (int i = 0; i < SIDE; ++i) {
        Floats column[SIDE];
        CMFAST_UNROLL
        for (int j = 0; j < SIDE; ++j) column[j] = load(m + (j * SIDE + i) * PANEL);
        Winograd<M>::output(column, 1, half + i, SIDE);
      }
      CMFAST_UNROLL
      for (int i = 0; i < M; ++i) Winograd<M>::output(half + i * SIDE, 1, y + i * M, 1);
    }
    Floats bias = p.bias ? load(p.bias + o, lanes) : zeros();
    int64_t high = at_most(p.out_height - ty * M, M), wide = at_most(p.out_width - tx * M, M);
    if (FAULT(tile_edge_missed) && wide < M) --wide;
    int64_t to = image.out + ty * M * out.y + tx * M * out.x + o;
    auto each = [&](auto body) __attribute__((always_inline)) {
      CMFAST_UNROLL
      for (int i = 0; i < M; ++i)
        CMFAST_UNROLL
        for (int j = 0; j < M; ++j)
          if (WHOLE || (i < high && j < wide)) body(i, j, y[i * M + j]);
    };
    each([&](int, int, Floats& value) __attribute__((always_inline)) { value += bias; });
    if (p.relu && FAULT(relu_before_residual))
      each([&](int, int, Floats& value) __attribute__((always_inline)) { value = max(zeros(), value); });
    if (added.data && resample == RESAMPLE_NONE) {
      int64_t at = image.added + ty * M * added.y + tx * M * added.x + o;
      each([&](int i, int j, Floats& value) __attribute__((always_inline)) {
        value += load(added.data, dtype, at + i * added.y + j * added.x, lanes);
      });
    } else if (added.data) {
      each([&](int i, int j, Floats& value) __attribute__((always_inline)) {
        value += resampled(added, resample, dtype, image.added, ty * M + i, tx * M + j, o, lanes);
      });
    }
    if (p.relu && !FAULT(relu_before_residual))  // NaN stays
      each([&](int, int, Floats& value) __attribute__((always_inline)) { value = max(zeros(), value); });
    if (first) sums.begin(y[0]);
    each([&](int i, int j, Floats& value) __attribute__((always_inline)) {
      store((void*)out.data, dtype, to + i * out.y + j * out.x, value, lanes);
      sums.add(value);
    });
    moments = sums;
  }

  // `width` channels from o on of all outputs of a part, whose products begin at `from`, those of rows of tiles so far apart.
  void write(const Part& b, const float* from, int64_t stride, int64_t o, int64_t width, Moments* moments) const {
    const Image image{p.out.image(b.n, b.z), p.residual.image(FAULT(residual_of_first_sample) ? 0 : b.n, b.z)};
    for (int64_t y = 0; y < b.rows; ++y)
      for (int64_t x = 0; x < b.columns; ++x) {
        int64_t ty = b.y + y, tx = b.x + x;
        bool whole = (ty + 1) * M <= p.out_height && (tx + 1) * M <= p.out_width, first = y == 0 && x == 0;
        for (int64_t j = 0; j < width; j += LANES) {
          const float* m = from + y * stride + x * (POINTS * PANEL) + j;
          Moments& sums = moments[j / LANES];
          int lanes = (int)at_most(width - j, LANES);
          // Of the most common outputs, the loop has no choices.
          if (whole && lanes == LANES && p.dtype == FLOAT32)
            write_tile<true>(image, ty, tx, m, o + j, FLOAT32, LANES, first, sums);
          else
            write_tile<false>(image, ty, tx, m, o + j, p.dtype, lanes, first, sums);
        }
      }
  }

  int64_t outputs(const Part& b) const {
    return at_most(p.out_height - b.y * M, b.rows * M) * at_most(p.out_width - b.x * M, b.columns * M);
  }

  // What the moments of the tile (y, x) of a larger part are taken of together.
  Part part_of_moments(const Part& b, int64_t y, int64_t x) const {
    return {b.n, b.z, y, x, at_most(b.y + b.rows - y, part_rows), at_most(b.x + b.columns - x, part_columns)};
  }

  // Of such a part: [2][Cout].
  float* slot(const Part& b) const {
    int64_t image = b.n * p.out_depth + b.z;
    return partial + ((image * parts_y + b.y / part_rows) * parts_x + b.x / part_columns) * 2 * p.shape.out_channels;
  }

  void write_panel(int64_t block, int64_t panel, const float* from) const {
    int64_t o = panel * PANEL, width = at_most(p.shape.out_channels - o, PANEL);
    if (FAULT(tail_of_outputs_missed)) width = width / LANES * LANES;
    Moments moments[PANEL / LANES];
    for (int64_t i = 0; i < parts(block); ++i) {
      const Part b = part(block, i);
      const int64_t stride = b.columns * (POINTS * PANEL);
      if (!partial) write(b, from, stride, o, width, moments);
      for (int64_t y = b.y; partial && y < b.y + b.rows; y += part_rows)
        for (int64_t x = b.x; x < b.x + b.columns; x += part_columns) {
          const Part together = part_of_moments(b, y, x);
          write(together, from + (y - b.y) * stride + (x - b.x) * (POINTS * PANEL), stride, o, width, moments);
          for (int64_t j = 0; j < width; j += LANES) {
            float* to = slot(together) + o + j;
            moments[j / LANES].finish(to, to + p.shape.out_channels, outputs(together), (int)at_most(width - j, LANES));
          }
        }
      from += b.rows * stride;
    }
  }

  // Outputs of part k of a sample's moments: all of its images are divided alike.
  int64_t elements_of(int64_t k) const {
    return outputs(part_of_moments({0, 0, 0, 0, image_rows, image_columns}, k / parts_x % parts_y * part_rows, k % parts_x * part_columns));
  }

  // ----

  const char* run() {
    bool divided = shared(), transforms = p.shape.transforms();
    int64_t operands = POINTS * point_stride;
    points = (float*)scratch(SCRATCH_INPUT, (divided ? 1 : threads) * operands * 4);
    products = (float*)scratch(SCRATCH_PRODUCTS, threads * tiles * POINTS * PANEL * 4);
    strips = (float*)scratch(SCRATCH_ROWS, threads * strip_floats * 4);
    made = transforms ? (float*)scratch(SCRATCH_WEIGHTS, threads * POINTS * MADE_STRIDE * 4) : nullptr;
    int64_t slots = images * parts_y * parts_x;
    partial = p.moments ? (float*)scratch(SCRATCH_STATISTICS, slots * 2 * p.shape.out_channels * 4) : nullptr;
    if (!points || !products || !strips || (transforms && !made) || (p.moments && !partial))
      return "no memory for the operands";
    auto body = [&](Team team) {
      TileUse use;
      float *mine = products + team.rank * tiles * POINTS * PANEL, *strip = strips + team.rank * strip_floats;
      float* weights = transforms ? made + team.rank * POINTS * MADE_STRIDE : nullptr;
      // Whole blocks of the left operand: of bfloat16, 32 channels.
      int64_t unit = BLOCK * WORD, filled = p.shape.tiled() ? p.shape.tap_stride() : p.shape.in_channels;
      int64_t units = ceil_divide(filled, unit);
      auto first_step = [&](int64_t block, float* to, Share channels) {
        for (int64_t c = channels.begin * unit; c < at_most(channels.end * unit, filled); c += BLOCK)
          put_channels(block, c, strip, to);
      };
      auto second_step = [&](int64_t block, const float* from, Share outputs) {
        for (int64_t panel = outputs.begin; panel < outputs.end; ++panel) {
          multiply(block, panel, from, weights, mine);
          write_panel(block, panel, mine);
        }
      };
      if (divided) {
        for (int64_t block = 0; block < blocks(); ++block) {
          first_step(block, points, share(units, team));
          team.barrier();
          second_step(block, points, share(panels(), team));
          team.barrier();
        }
      } else {
        Share blocks_of_mine = share(blocks(), team);
        for (int64_t block = blocks_of_mine.begin; block < blocks_of_mine.end; ++block) {
          float* own = points + team.rank * operands;
          first_step(block, own, {0, units});
          second_step(block, own, {0, panels()});
        }
        team.barrier();
      }
      if (!partial) return;
      Share samples_of_mine = share(p.samples, team);
      int64_t each = (FAULT(moments_of_one_image) ? 1 : p.out_depth) * parts_y * parts_x;
      int64_t of_sample = 2 * p.shape.out_channels;
      for (int64_t n = samples_of_mine.begin; n < samples_of_mine.end; ++n)
        merge_moments(partial + n * each * of_sample, each, p.shape.out_channels, 0, p.shape.out_channels,
                      [&](int64_t k) { return elements_of(k); }, p.moments + n * of_sample);
    };
    parallel(threads, body);
    return nullptr;
  }
};

}  // namespace

const char* conv2d(const ConvArguments& p) {
  const ConvShape& s = p.shape;
  const int64_t sizes[] = {p.samples, p.depth, p.height, p.width, p.out_depth, p.out_height, p.out_width};
  for (int64_t size : sizes)
    if (size <= 0) return "a size is not positive";
  if (TILES ? s.pairs && !s.tiles : s.tiled()) return "the weights were packed for another instruction set: prepare them here";
  if (p.channels() != s.in_channels) return "the input has not the channels of the packed weights";
  if (p.gate && p.skip.channels != p.h.channels) return "the gate has not the channels of what it multiplies";
  if (s.tile != 1 && (s.height != 3 || s.width != 3 || p.stride_y != 1 || p.stride_x != 1))
    return "Winograd's form has 3 by 3 kernels and a stride of 1";
  if (s.transforms() && s.pairs) return "weights to be transformed are Winograd's, of float32";
  bool resampled = p.resample != RESAMPLE_NONE || p.residual_resample != RESAMPLE_NONE;
  bool same = p.depth == p.out_depth && p.height == p.out_height && p.width == p.out_width;
  bool moves = !same || p.front || p.top || p.left || p.stride_z > 1 || p.stride_y > 1 || p.stride_x > 1;
  bool is_pointwise = s.depth * s.area() == 1 && !moves && !resampled;
#if defined(CMFAST_TILES)
  bool few = is_pointwise && !s.split() && p.height * p.width < TILE;  // then tiles have rows of several samples
  if (s.tiled() && s.tile == 1 && !few) return conv_by_tiles(p);
#endif
  if (is_pointwise) return pointwise(p);
  switch (s.tile * 2 + s.pairs) {
    case 2: return Convolution<1, false>(p).run();
    case 3: return Convolution<1, true>(p).run();
    case 4: return Convolution<2, false>(p).run();
    case 5: return Convolution<2, true>(p).run();
    case 8: return Convolution<4, false>(p).run();
    case 9: return Convolution<4, true>(p).run();
  }
  return "a tile is 1, 2 or 4 outputs wide";
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
