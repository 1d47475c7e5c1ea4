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

// V channels from `column` on of one sample.
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
    if (p.bias && column < p.columns) to_float(load_vector<float, V>(p.bias + column), bias);
  }

  // Write the output of a position from its sums; `values` are then what was written, in float32 and less the bias: a
  // large one would leave their moments few digits.
  __device__ __forceinline__ void operator()(int y, int x, float (&values)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] += bias[i];
    if (p.residual.data) add_residual(y, x, values);
    if (p.relu) {
#pragma unroll
      for (float& v : values) v = v < 0 ? 0.0f : v;  // NaN stays NaN
    }
    T* out = p.out.sample<T>(n) + column + y * p.out.stride_y + x * p.out.stride_x;
    store_global(out, from_float<T>(values));
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] -= bias[i];
  }

  __device__ __forceinline__ void add_residual(int y, int x, float (&values)[V]) const {
    const T* residual = p.residual.sample<T>(n) + column;
    int stride_y = p.residual.stride_y, stride_x = p.residual.stride_x;
    float each[V], total[V];
    auto read = [&](int y, int x) {
      to_float(load_vector<T, V>(residual + y * stride_y + x * stride_x), each);
    };
    if (p.residual_resample == CONV_AVERAGE) {
#pragma unroll
      for (float& t : total) t = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        read(2 * y + i / 2, 2 * x + i % 2);
#pragma unroll
        for (int j = 0; j < V; ++j) total[j] += each[j];
      }
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] += 0.25f * total[j];
      return;
    }
    int shift = p.residual_resample == CONV_NEAREST ? 1 : 0;
    read(y >> shift, x >> shift);
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] += each[j];
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
