// What follows a convolution's products (conv.cu): the sum of its segments, with all that is added to it, or the moments
// of its tiles merged. Both in the order of the segments and tiles, so their bits are the same from run to run.
#include "conv_sum.h"

#include "conv_output.cuh"

namespace cmfast {
namespace {

constexpr int SUM_VECTOR = 4, SUM_VECTORS = 4;  // 16 channels of a block: whole sectors of sums and of the output
constexpr int SUM_MOST_THREADS = 512;
constexpr int MERGE_THREADS = 256;
constexpr int MERGE_VECTOR = 4, MERGE_VECTORS = 8;  // 32 channels of a block
constexpr int SUM_POSITIONS = 4;                    // of a thread, whose loads are in flight together

struct Sum {
  ConvOutput output;
  const float* partials;
  float* moments;
  int segments, blocks;
};

// A block has all positions of a sample, and 16 channels of them.
template <class T>
__global__ void __launch_bounds__(SUM_MOST_THREADS) conv_sum_kernel(Sum p) {
  CMFAST_SHARED(memory);
  const ConvOutput& output = p.output;
  int64_t n = static_cast<int>(blockIdx.x) / p.blocks;
  int vector = static_cast<int>(blockIdx.x) % p.blocks * SUM_VECTORS + static_cast<int>(threadIdx.x) % SUM_VECTORS;
  int column = vector * SUM_VECTOR;
  bool there = column < output.columns;
  ConvFinish<T, SUM_VECTOR> write(output, n, min(column, output.columns - SUM_VECTOR));
  Moments<SUM_VECTOR> moments;
  int positions = output.height * output.width, rows = static_cast<int>(blockDim.x) / SUM_VECTORS;
  int64_t segment_stride = static_cast<int64_t>(output.samples) * positions * output.columns;
  const float* partials = p.partials + n * positions * output.columns + write.column;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / SUM_VECTORS; first < positions; first += SUM_POSITIONS * rows) {
    // What lies behind the last position reads the last.
    int y[SUM_POSITIONS], x[SUM_POSITIONS], offsets[SUM_POSITIONS];
    float values[SUM_POSITIONS][SUM_VECTOR] = {};
#pragma unroll
    for (int u = 0; u < SUM_POSITIONS; ++u) {
      int position = min(first + u * rows, positions - 1);
      y[u] = position / output.width;
      x[u] = position % output.width;
      offsets[u] = position * output.columns;
    }
#pragma unroll 2
    for (int s = 0; s < p.segments; ++s) {
      float part[SUM_POSITIONS][SUM_VECTOR];
#pragma unroll
      for (int u = 0; u < SUM_POSITIONS; ++u)
        to_float(load_vector<float, SUM_VECTOR>(partials + s * segment_stride + offsets[u]), part[u]);
#pragma unroll
      for (int u = 0; u < SUM_POSITIONS; ++u)
#pragma unroll
        for (int i = 0; i < SUM_VECTOR; ++i) values[u][i] += part[u][i];
    }
    write.add(y, x, values);
#pragma unroll
    for (int u = 0; u < SUM_POSITIONS; ++u) {
      int position = first + u * rows;
      if (position >= CMFAST_BOUND(1, positions) || !there) continue;
      write.store(position / output.width, position % output.width, values[u]);
      if (p.moments) moments.add(values[u]);
    }
  }
  if (p.moments) {
    merge_over_block<SUM_VECTORS>(moments, reinterpret_cast<float*>(memory));
    if (threadIdx.x < SUM_VECTORS && there) {
#pragma unroll
      for (int j = 0; j < SUM_VECTOR; ++j) moments.mean[j] += write.bias[j];
      write_moments(p.moments + n * 2 * output.columns + column, output.columns, moments);
    }
  }
}

struct Merge {
  const float *slots, *bias;
  float* moments;
  int height, width, columns, tiles_y, tiles_x, tile_width, blocks;
};

// A block has 32 channels of a sample.
__global__ void __launch_bounds__(MERGE_THREADS) conv_merge_kernel(Merge p) {
  CMFAST_SHARED(memory);
  int64_t n = static_cast<int>(blockIdx.x) / p.blocks;
  int vector = static_cast<int>(blockIdx.x) % p.blocks * MERGE_VECTORS + static_cast<int>(threadIdx.x) % MERGE_VECTORS;
  int column = vector * MERGE_VECTOR, tiles = p.tiles_y * p.tiles_x;
  bool there = column < p.columns;
  Moments<MERGE_VECTOR> moments;
#pragma unroll 1
  for (int tile = static_cast<int>(threadIdx.x) / MERGE_VECTORS; tile < CMFAST_BOUND(2, tiles);
       tile += MERGE_THREADS / MERGE_VECTORS) {
    if (!there) continue;
    const float* slot = p.slots + (n * tiles + tile) * 2 * p.columns + column;
    Moments<MERGE_VECTOR> other;
    other.count = static_cast<float>(min(CONV_ROWS, p.height - tile / p.tiles_x * CONV_ROWS) *
                                     min(p.tile_width, p.width - tile % p.tiles_x * p.tile_width));
    to_float(load_vector<float, MERGE_VECTOR>(slot), other.mean);
    to_float(load_vector<float, MERGE_VECTOR>(slot + p.columns), other.deviation);
    moments.merge(other);
  }
  merge_over_block<MERGE_VECTORS>(moments, reinterpret_cast<float*>(memory));
  if (threadIdx.x < MERGE_VECTORS && there) {
    if (p.bias) {
      float bias[MERGE_VECTOR];
      to_float(load_vector<float, MERGE_VECTOR>(p.bias + column), bias);
#pragma unroll
      for (int j = 0; j < MERGE_VECTOR; ++j) moments.mean[j] += bias[j];
    }
    write_moments(p.moments + n * 2 * p.columns + column, p.columns, moments);
  }
}

int divided(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

}  // namespace

std::string conv_sum(const ConvProblem& problem, int64_t segments, void* stream) {
  int blocks = divided(problem.columns, SUM_VECTORS * SUM_VECTOR);
  Sum p = {conv_output(problem), problem.workspace, problem.moments, static_cast<int>(segments), blocks};
  int64_t all = problem.samples * blocks, positions = problem.height * problem.width;
  if (all > 0x7fffffff) return std::to_string(all) + " blocks are more than a grid has";
  int64_t wanted = divided(divided(positions, SUM_POSITIONS) * SUM_VECTORS, 32) * 32;
  int64_t threads = std::min<int64_t>(wanted, SUM_MOST_THREADS);
  size_t shared = merge_floats<SUM_VECTOR, SUM_VECTORS>(static_cast<int>(threads / 32)) * sizeof(float);
  LaunchConfig config{dim3(static_cast<unsigned>(all)), dim3(static_cast<unsigned>(threads)), shared, stream};
  return problem.dtype == FLOAT16 ? launch(conv_sum_kernel<__half>, config, p)
                                  : launch(conv_sum_kernel<__nv_bfloat16>, config, p);
}

std::string conv_merge(const ConvProblem& problem, int64_t tiles_y, int64_t tiles_x, void* stream) {
  int blocks = divided(problem.columns, MERGE_VECTOR * MERGE_VECTORS);
  Merge p = {problem.workspace,
             problem.bias,
             problem.moments,
             static_cast<int>(problem.height),
             static_cast<int>(problem.width),
             static_cast<int>(problem.columns),
             static_cast<int>(tiles_y),
             static_cast<int>(tiles_x),
             problem.tile_width,
             blocks};
  int64_t all = problem.samples * blocks;
  if (all > 0x7fffffff) return std::to_string(all) + " blocks are more than a grid has";
  size_t shared = merge_floats<MERGE_VECTOR, MERGE_VECTORS>(MERGE_THREADS / 32) * sizeof(float);
  LaunchConfig config{dim3(static_cast<unsigned>(all)), dim3(MERGE_THREADS), shared, stream};
  return launch(conv_merge_kernel, config, p);
}

}  // namespace cmfast
