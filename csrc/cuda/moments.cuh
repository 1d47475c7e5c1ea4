// Means and sums of squared deviations from them of V adjacent channels: one value at a time (Welford 1962, "Note on a
// method for calculating corrected sums of squares and products"), or those of two sets of values merged (Chan, Golub
// and LeVeque 1983, equation 2.1).
#pragma once

#include "primitives.cuh"

namespace cmfast {

template <int V>
struct Moments {
  float count = 0;  // of the values of each channel
  float mean[V] = {}, deviation[V] = {};

  __device__ __forceinline__ void add(const float (&values)[V]) {
    count += 1;
    float part = fast_rcp(count);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float apart = values[i] - mean[i];
      mean[i] += apart * part;
      deviation[i] += apart * (values[i] - mean[i]);
    }
  }

  __device__ __forceinline__ void merge(const Moments& other) {
    float total = count + other.count;
    float part = total > 0 ? other.count * fast_rcp(total) : 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float apart = other.mean[i] - mean[i];
      deviation[i] += other.deviation[i] + apart * apart * count * part;
      mean[i] += apart * part;
    }
    count = total;
  }
};

// Floats of shared memory that merge_over_block takes for so many warps.
template <int V, int VECTORS>
constexpr int merge_floats(int warps) {
  return warps * VECTORS * (2 * V + 1);
}

// Merge the moments of all threads t with the same t mod VECTORS; threads t < VECTORS of the block have the result.
template <int VECTORS, int V>
__device__ __forceinline__ void merge_over_block(Moments<V>& moments, float* shared) {
  static_assert(VECTORS < 32 && 32 % VECTORS == 0);
#pragma unroll
  for (int lanes = VECTORS; lanes < 32; lanes *= 2) {
    Moments<V> other;
    other.count = __shfl_xor_sync(0xffffffffu, moments.count, lanes);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      other.mean[i] = __shfl_xor_sync(0xffffffffu, moments.mean[i], lanes);
      other.deviation[i] = __shfl_xor_sync(0xffffffffu, moments.deviation[i], lanes);
    }
    moments.merge(other);
  }
  constexpr int EACH = 2 * V + 1;
  int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < VECTORS) {
    float* mine = shared + (warp * VECTORS + lane) * EACH;
    mine[0] = moments.count;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      mine[1 + i] = moments.mean[i];
      mine[1 + V + i] = moments.deviation[i];
    }
  }
  CMFAST_SYNC(1);
  if (warp == 0 && lane < VECTORS) {
    int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll 1
    for (int w = 1; w < warps; ++w) {
      const float* theirs = shared + (w * VECTORS + lane) * EACH;
      Moments<V> other;
      other.count = theirs[0];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        other.mean[i] = theirs[1 + i];
        other.deviation[i] = theirs[1 + V + i];
      }
      moments.merge(other);
    }
  }
}

}  // namespace cmfast
