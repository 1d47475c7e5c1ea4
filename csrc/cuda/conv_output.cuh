// What is added to a convolution's sums, a vector of channels of a position at a time: bias, residual and ReLU.
#pragma once

#include "conv.h"
#include "moments.cuh"

namespace cmfast {

constexpr int CONV_VECTOR = 8;  // channels in 16 bytes

// An image as the kernels take it; reaches of a sample fit in 32 bits.
struct ConvView {
  void* data;
  int64_t stride_n;
  int stride_y, stride_x;

  template <class T>
  __device__ __forceinline__ T* sample(int64_t n) const {
    return static_cast<T*>(data) + n * stride_n;
  }
};

inline ConvView conv_view(const ConvImage& x) {
  return {x.data, x.stride_n, static_cast<int>(x.stride_y), static_cast<int>(x.stride_x)};
}

struct ConvOutput {
  ConvView residual, out;
  const float* bias;
  int residual_resample, relu;
  int samples, height, width, columns;
};

inline ConvOutput conv_output(const ConvProblem& p) {
  return {conv_view(p.residual),
          conv_view(p.out),
          p.bias,
          p.residual_resample,
          p.relu,
          static_cast<int>(p.samples),
          static_cast<int>(p.height),
          static_cast<int>(p.width),
          static_cast<int>(p.columns)};
}

// V channels of one sample, from `column` on, which are there.
template <class T, int V>
struct ConvFinish {
  const ConvOutput& p;
  int64_t n;
  int column;
  float bias[V];

  __device__ __forceinline__ ConvFinish(const ConvOutput& p, int64_t n, int column)
      : p(p), n(n), column(column) {
#pragma unroll
    for (float& b : bias) b = 0;
    if (p.bias) to_float(load_vector<float, V>(p.bias + column), bias);
  }

  // Add to the sums of U positions, which are all read before the first is used.
  template <int U>
  __device__ __forceinline__ void add(const int (&y)[U], const int (&x)[U], float (&values)[U][V]) const {
    if (p.residual.data) add_residual(y, x, values);
#pragma unroll
    for (auto& at : values) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        at[i] += bias[i];
        if (p.relu) at[i] = at[i] < 0 ? 0.0f : at[i];  // NaN stays NaN
      }
    }
  }

  // Write the output of a position; `values` are then what was written, in float32 and less the bias: a large one would
  // leave their moments few digits.
  __device__ __forceinline__ void store(int y, int x, float (&values)[V]) const {
    T* out = p.out.sample<T>(n) + column + y * p.out.stride_y + x * p.out.stride_x;
    store_global(out, from_float<T>(values));
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] -= bias[i];
  }

  template <int U>
  __device__ __forceinline__ void add_residual(const int (&y)[U], const int (&x)[U], float (&values)[U][V]) const {
    const T* residual = p.residual.sample<T>(n) + column;
    int taps = p.residual_resample == CONV_AVERAGE ? 4 : 1, shift = p.residual_resample == CONV_NEAREST ? 1 : 0;
    int step = taps == 4 ? 2 : 1;
    float share = taps == 4 ? 0.25f : 1.0f;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      Vector<T, V> each[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        int at_y = (y[u] * step >> shift) + tap / 2, at_x = (x[u] * step >> shift) + tap % 2;
        each[u] = load_vector<T, V>(residual + at_y * p.residual.stride_y + at_x * p.residual.stride_x);
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int i = 0; i < V; ++i) values[u][i] += share * to_float(each[u].data[i]);
    }
  }
};

// Write the moments of V channels to a slot [2, columns].
template <int V>
__device__ __forceinline__ void write_moments(float* slot, int columns, const Moments<V>& moments) {
  Vector<float, V> mean, deviation;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    mean.data[i] = moments.mean[i];
    deviation.data[i] = moments.deviation[i];
  }
  store_global(slot, mean);
  store_global(slot + columns, deviation);
}

}  // namespace cmfast
