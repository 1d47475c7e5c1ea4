// Convolution of 3 x 3 elements as an implicit matrix product: an operand is gathered from a tile with its halo.
//
//   out[p, n] = Σ u[p + tap, c] · weight[tap, c, n] + bias[n] + residual[p, n],   u = silu(x · gain + offset)
//
// A block has 8 x 16 positions (or 8 x 8) of a sample and 32 channels of the output. It goes through the channels of the
// input, 32 a step, first those of h, then those of skip: it copies them for its positions and their halo to shared
// memory once, normalises and activates them there, and reads them for the nine taps as the same lines shifted. So
// nothing is written before the product, and gain, offset and SiLU cost one element of the halo, not one of each tap.
// While the products of a step are taken, the copies of the next are in flight, and are activated between taps.
//
// What this tile costs, of 192 → 192 channels at 64 x 64, bfloat16 (a sector has 32 bytes; an H100 has 132
// multiprocessors; instructions are those of the prologue, 66 for 8 elements, for each 16 x 8 x 16 product of a warp):
//
//   positions x outputs   blocks   sectors of input + weights         halo   instructions
//   8 x 16 x 64               96     207,360 +   663,552 =   870,912   1.41   1.3           too few blocks
//   8 x  8 x 96              128     153,600 + 1,327,104 = 1,480,704   1.56   1.0           too few blocks
//   8 x  8 x 64              192     230,400 + 1,327,104 = 1,557,504   1.56   1.4
//   8 x 16 x 32              192     414,720 +   663,552 = 1,078,272   1.41   2.6           this one
//   16 x 16 x 16             192     746,496 +   331,776 = 1,078,272   1.27   4.6
//
// (Halos that reach beyond the image are not read.) The product without a halo, 64 x 64, asks for 2,629,776.
//
// Where a sample has few positions, the sum is taken in segments, each by a block of its own, and added up in their
// order by conv_sum.cu. The segments follow from the shape of one sample, and a tile's width does not change the order
// of a sum: so a sample has the same bits in any batch.
#include "conv.h"

#include "conv_sum.h"
#include "conv_tile.cuh"

namespace cmfast {
namespace {

struct ConvProduct {
  ConvView h, skip;
  ConvRows gain, offset;
  const void* weight;
  ConvOutput output;
  float *partials, *slots;
  int channels, skip_channels, up, activated, silu, segment, tiles_y, tiles_x, tiles_n;
};

// A block's sample, tile, its first position and its first column.
struct ConvPlace {
  int64_t n;
  int tile, y, x, column;
};

// The gains and then the offsets of the channels of the block's steps; 1 and 0 where there are none.
__device__ __forceinline__ void copy_rows(float* rows, const ConvProduct& p, int64_t n, int begin, int end,
                                          int steps_of_h) {
  constexpr int VECTOR = 4;
  for (int i = static_cast<int>(threadIdx.x) * VECTOR; i < (end - begin) * CONV_CHANNELS; i += CONV_THREADS * VECTOR) {
    int step = begin + i / CONV_CHANNELS, of_skip = step >= steps_of_h;
    int c = (step - of_skip * steps_of_h) * CONV_CHANNELS + i % CONV_CHANNELS;
    bool there = c < (of_skip ? p.skip_channels : p.channels);
    c += of_skip * p.channels;
    Vector<float, VECTOR> gain = {{1, 1, 1, 1}}, offset = {};
    if (p.gain.data && there) {
      gain = load_vector<float, VECTOR>(p.gain.data + n * p.gain.stride_n + c);
      offset = load_vector<float, VECTOR>(p.offset.data + n * p.offset.stride_n + c);
    }
    store_vector(rows + i, gain);
    store_vector(rows + (end - begin) * CONV_CHANNELS + i, offset);
  }
}

// Write the sums of a segment.
template <int WIDTH>
__device__ __forceinline__ void write_partials(const ConvProduct& p, const ConvPlace& place, const ConvSums& sums) {
  constexpr int V = 4, VECTORS = CONV_COLUMNS / V;
  const ConvOutput& o = p.output;
  int column = place.column + static_cast<int>(threadIdx.x) % VECTORS * V;
  int64_t sample = (blockIdx.y * static_cast<int64_t>(o.samples) + place.n) * o.height * o.width;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / VECTORS; row < CONV_ROWS * WIDTH; row += CONV_THREADS / VECTORS) {
    int y = place.y + row / WIDTH, x = place.x + row % WIDTH;
    if (y >= CMFAST_BOUND(8, o.height) || x >= CMFAST_BOUND(9, o.width) || column >= o.columns) continue;
    float values[V];
    sums.get(row, column - place.column, values);
    store_global(p.partials + (sample + y * o.width + x) * o.columns + column, from_float<float>(values));
  }
}

// Write the output and the tile's moments; `shared` is memory for those. What lies outside reads what lies inside.
template <class T, int WIDTH>
__device__ __forceinline__ void finish(const ConvProduct& p, const ConvPlace& place, const ConvSums& sums,
                                       float* shared) {
  constexpr int V = CONV_VECTOR, U = CONV_ROWS * WIDTH / CONV_LINES;
  const ConvOutput& o = p.output;
  int vector = static_cast<int>(threadIdx.x) % CONV_QUADS * V, column = place.column + vector;
  ConvFinish<T, V> write(o, place.n, min(column, o.columns - V));
  Moments<V> moments;
  int y[U], x[U];
  float values[U][V];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    int row = static_cast<int>(threadIdx.x) / CONV_QUADS + u * CONV_LINES;
    y[u] = min(place.y + row / WIDTH, o.height - 1);
    x[u] = min(place.x + row % WIDTH, o.width - 1);
    sums.get(row, vector, values[u]);
  }
  write.add(y, x, values);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    int row = static_cast<int>(threadIdx.x) / CONV_QUADS + u * CONV_LINES;
    int at_y = place.y + row / WIDTH, at_x = place.x + row % WIDTH;
    if (at_y >= CMFAST_BOUND(10, o.height) || at_x >= CMFAST_BOUND(11, o.width) || column >= o.columns) continue;
    write.store(at_y, at_x, values[u]);
    if (p.slots) moments.add(values[u]);
  }
  if (p.slots) {
    merge_over_block<CONV_QUADS>(moments, shared);
    if (threadIdx.x < CONV_QUADS && column < o.columns)
      write_moments(p.slots + (place.n * p.tiles_y * p.tiles_x + place.tile) * 2 * o.columns + column, o.columns,
                    moments);
  }
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(CONV_THREADS, 2) conv_product_kernel(ConvProduct p) {
  using Tile = ConvTile<T, WIDTH>;
  CMFAST_SHARED(memory);
  int block = static_cast<int>(blockIdx.x);
  int column = block % p.tiles_n * CONV_COLUMNS;
  int tile = block / p.tiles_n % (p.tiles_y * p.tiles_x);
  int64_t n = block / p.tiles_n / (p.tiles_y * p.tiles_x);
  int first_y = tile / p.tiles_x * CONV_ROWS, first_x = tile % p.tiles_x * WIDTH;
  int steps_of_h = (p.channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
  int steps = steps_of_h + (p.skip_channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
  int begin = static_cast<int>(blockIdx.y) * p.segment, end = min(begin + p.segment, steps);

  float* rows = reinterpret_cast<float*>(memory + 2 * Tile::BYTES);
  float gain[CONV_VECTOR], offset[CONV_VECTOR];
  ConvHalo<T, WIDTH> halo;
  auto copy = [&](int step, unsigned char* stage) {
    bool of_skip = step >= steps_of_h;
    const ConvView& image = of_skip ? p.skip : p.h;
    int channels = of_skip ? p.skip_channels : p.channels;
    int first = (step - (of_skip ? steps_of_h : 0)) * CONV_CHANNELS;
    if (step == begin || step == steps_of_h)
      halo.locate(image, first_y, first_x, p.output.height, p.output.width, p.up);
    halo.copy(stage, image.sample<T>(n) + first, channels - first);
    cp_async_commit();
    int64_t row = (of_skip ? p.channels : 0) + first;
    copy_weights<T>(stage + Tile::WEIGHTS,
                    static_cast<const T*>(p.weight) + row * p.output.columns + column,
                    static_cast<int64_t>(p.channels + p.skip_channels) * p.output.columns, p.output.columns,
                    channels - first, p.output.columns - column);
    cp_async_commit();
  };
  auto read_rows = [&](int step) {
    const float* at = rows + (step - begin) * CONV_CHANNELS + conv_vector() * CONV_VECTOR;
    to_float(load_vector<float, CONV_VECTOR>(at), gain);
    to_float(load_vector<float, CONV_VECTOR>(at + (end - begin) * CONV_CHANNELS), offset);
  };

  unsigned char *stage = memory, *next_stage = memory + Tile::BYTES;
  copy(begin, stage);
  if (p.activated) {
    copy_rows(rows, p, n, begin, end, steps_of_h);
    CMFAST_CP_ASYNC_WAIT(1, 1);
    CMFAST_SYNC(2);
    read_rows(begin);
#pragma unroll
    for (int i = 0; i < Tile::VECTORS; ++i) halo.activate(stage, i, gain, offset, p.silu);
  }
  typename Tile::Sums sums = {};
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    CMFAST_CP_ASYNC_WAIT(3, 0);
    CMFAST_SYNC(4);
    bool next = step + 1 < end, activates = next && p.activated;
    if (next) copy(step + 1, next_stage);
    ConvOperands<T, WIDTH> operands(stage);
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      int i = tap - (9 - Tile::VECTORS);
      if (i == 0 && activates) {
        CMFAST_CP_ASYNC_WAIT(5, 1);
        read_rows(step + 1);
      }
      if (i >= 0 && activates) halo.activate(next_stage, i, gain, offset, p.silu);
      operands.multiply(sums, tap);
    }
    unsigned char* done = stage;
    stage = next_stage;
    next_stage = done;
  }

  CMFAST_SYNC(6);
  ConvSums total{reinterpret_cast<float*>(memory)};
  total.put<T, WIDTH>(sums);
  CMFAST_SYNC(7);
  ConvPlace place{n, tile, first_y, first_x, column};
  if (p.partials) write_partials<WIDTH>(p, place, total);
  else finish<T, WIDTH>(p, place, total, total.memory + Tile::POSITIONS * ConvSums::PITCH);
}

template <class T, int WIDTH>
std::string launch_product(const ConvProblem& problem, const ConvProduct& p, int64_t segments, void* stream) {
  using Tile = ConvTile<T, WIDTH>;
  static_assert((Tile::POSITIONS * ConvSums::PITCH + merge_floats<CONV_VECTOR, CONV_QUADS>(CONV_THREADS / 32)) * 4 <=
                2 * Tile::BYTES);
  size_t shared = 2 * Tile::BYTES;
  if (p.activated) shared += static_cast<size_t>(p.segment) * CONV_CHANNELS * 2 * sizeof(float);
  int64_t blocks = problem.samples * p.tiles_y * p.tiles_x * p.tiles_n;
  if (blocks > 0x7fffffff || segments > 65535)
    return std::to_string(blocks) + " tiles of " + std::to_string(segments) + " segments are more than a grid has";
  LaunchConfig config{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(segments)), dim3(CONV_THREADS), shared,
                      stream};
  return launch(conv_product_kernel<T, WIDTH>, config, p);
}

template <class T>
std::string launch_conv(const ConvProblem& problem, const ConvProduct& p, int64_t segments, void* stream) {
  std::string error = problem.tile_width == 16 ? launch_product<T, 16>(problem, p, segments, stream)
                                               : launch_product<T, 8>(problem, p, segments, stream);
  if (error.empty() && segments > 1) error = conv_sum(problem, segments, stream);
  if (error.empty() && p.slots) error = conv_merge(problem, p.tiles_y, p.tiles_x, stream);
  return error;
}

// What is wrong with a problem, or nothing.
std::string check(const ConvProblem& p) {
  auto text = [](int64_t n) { return std::to_string(n); };
  constexpr int64_t most = 1 << 30;
  if (p.dtype != FLOAT16 && p.dtype != BFLOAT16) return "expected float16 or bfloat16 (1 or 2), got " + text(p.dtype);
  for (int64_t size : {p.samples, p.height, p.width, p.channels, p.columns})
    if (size < 1 || size > most) return "expected sizes of 1 to 2^30, got " + text(size);
  for (int64_t c : {p.channels, p.skip_channels, p.columns})
    if (c % CONV_VECTOR || c < 0 || c > most) return "expected multiples of 8 channels, got " + text(c);
  if (p.tile_width != 16 && p.tile_width != 8) return "expected tiles 16 or 8 wide, got " + text(p.tile_width);
  if (p.segment < 1) return "expected segments of a step or more, got " + text(p.segment);
  if ((p.skip.data != nullptr) != (p.skip_channels > 0)) return "expected channels of skip where there is one";
  return "";
}

}  // namespace

std::string conv2d(const ConvProblem& problem, void* stream) {
  if (std::string wrong = check(problem); !wrong.empty()) return "conv2d: " + wrong;
  auto divided = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  int64_t steps = divided(problem.channels, CONV_CHANNELS) + divided(problem.skip_channels, CONV_CHANNELS);
  int64_t segments = divided(steps, problem.segment);
  if (!problem.workspace && (segments > 1 || problem.moments)) return "conv2d: expected a workspace, got none";
  ConvProduct p = {};
  p.h = conv_view(problem.h);
  p.skip = conv_view(problem.skip);
  p.gain = problem.gain;
  p.offset = problem.offset;
  p.weight = problem.weight;
  p.output = conv_output(problem);
  p.partials = segments > 1 ? problem.workspace : nullptr;
  p.slots = segments == 1 && problem.moments ? problem.workspace : nullptr;
  p.channels = static_cast<int>(problem.channels);
  p.skip_channels = static_cast<int>(problem.skip_channels);
  p.up = problem.up;
  p.activated = problem.gain.data || problem.silu;
  p.silu = problem.silu;
  p.segment = static_cast<int>(steps < problem.segment ? steps : problem.segment);
  p.tiles_y = static_cast<int>(divided(problem.height, CONV_ROWS));
  p.tiles_x = static_cast<int>(divided(problem.width, problem.tile_width));
  p.tiles_n = static_cast<int>(divided(problem.columns, CONV_COLUMNS));
  std::string error = problem.dtype == FLOAT16 ? launch_conv<__half>(problem, p, segments, stream)
                                               : launch_conv<__nv_bfloat16>(problem, p, segments, stream);
  return error.empty() ? error : "conv2d: " + error;
}

}  // namespace cmfast
