// The consistency step and its derivative, one launch each.
//
//     denoised    = clip(a · x + b · model_output)
//     sample      = alpha · denoised + beta · z
//     model_input = input_scale · sample
//
// Dimensions that are adjacent in the memory of every tensor are merged. Where one dimension is left and everything is
// aligned, as with dense tensors of one format, the dense kernels move 16 bytes of each tensor a thread. All else,
// slices and broadcasts and tensors of different formats, goes through the strided kernels: a thread has four elements
// and finds the address of each by its digits.
//
// One Philox call makes the normals of four elements that are consecutive in [C, *spatial] order. In a contiguous sample
// these are the thread's own. In a channels-last sample the neighbours in memory are the other channels of a position:
// the block makes the normals of all channels of its positions by whole calls and reorders them through shared memory.
#include "consistency.h"

#include <algorithm>
#include <climits>

#include "philox.cuh"
#include "primitives.cuh"

namespace cmfast {
namespace {

constexpr int DIMS = 8;

// Channels up to which normals are reordered; beyond it a block would have few positions.
constexpr int64_t GATHERED_CHANNELS = 64;

// Blocks that fill a large chip, two a multiprocessor; where there would be fewer, they are small.
constexpr int64_t MANY_BLOCKS = 264;

struct Strides {
  int64_t n, of[DIMS];
};

// The merged dimensions of a sample, outermost first.
struct Layout {
  int dims;
  int64_t size;  // elements of a sample
  int64_t sizes[DIMS];
  uint32_t tiles;  // blocks of a sample
};

// ---- what a thread computes

struct Loaded {
  float a, b, alpha, beta, input_scale, low, high;
  bool clip;
};

__device__ __forceinline__ float load_any(const void* data, int dtype, int64_t i) {
  if (dtype == FLOAT32) return static_cast<const float*>(data)[i];
  if (dtype == FLOAT16) return to_float(static_cast<const __half*>(data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
}

__device__ __forceinline__ void store_any(void* data, int dtype, int64_t i, float value) {
  if (dtype == FLOAT32) static_cast<float*>(data)[i] = value;
  else if (dtype == FLOAT16) static_cast<__half*>(data)[i] = from_float<__half>(value);
  else static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(value);
}

__device__ __forceinline__ float load_coefficient(const Coefficient& c, int64_t n) {
  return c.vector ? c.vector[n * c.stride] : c.scalar;
}

__device__ __forceinline__ Loaded load_coefficients(const Coefficients& c, int64_t n) {
  return {load_coefficient(c.a, n),           load_coefficient(c.b, n), load_coefficient(c.alpha, n),
          load_coefficient(c.beta, n),        load_coefficient(c.input_scale, n),
          c.low,                              c.high,                   c.clip};
}

__device__ __forceinline__ Noise load_noise(Noise noise) {
  if (noise.seed_at) noise.seed = static_cast<uint64_t>(*noise.seed_at);
  if (noise.first_sample_at) noise.first_sample = static_cast<uint32_t>(*noise.first_sample_at);
  return noise;
}

__device__ __forceinline__ float denoise(const Loaded& c, float x, float model_output) {
  float value = c.a * x + c.b * model_output;
  if (c.clip) value = value < c.low ? c.low : value > c.high ? c.high : value;  // NaN stays
  return value;
}

// The gradient of what was clipped, given those of denoised and sample.
__device__ __forceinline__ float gradient(const Loaded& c, float d_denoised, float d_sample, float unclipped) {
  float d = d_denoised + c.alpha * d_sample;
  return !c.clip || (unclipped >= c.low && unclipped <= c.high) ? d : 0.0f;
}

// ---- dense

template <class X, class M>
constexpr int VECTOR = sizeof(X) == 2 && sizeof(M) == 2 ? 8 : 4;

template <class T, int V>
__device__ __forceinline__ void load_dense(const void* data, int64_t i, float (&values)[V]) {
  to_float(load_vector<T, V>(static_cast<const T*>(data) + i), values);
}

template <class T, int V>
__device__ __forceinline__ void store_dense(void* data, int64_t i, const float (&values)[V]) {
  store_global(static_cast<T*>(data) + i, from_float<T, V>(values));
}

struct DenseStep {
  const void *x, *model_output, *noise;
  void *denoised, *sample, *model_input;
  int64_t x_n, model_output_n, noise_n, out_n;
  int64_t size;
  uint32_t tiles, tile;  // blocks of a sample and elements of a block
  uint32_t channels;     // of channels-last samples with counter-based noise, else 0
  Coefficients coefficients;
  Noise seed;
};

template <class X, class M>
__global__ void __launch_bounds__(256) step_dense(DenseStep p) {
  constexpr int V = VECTOR<X, M>;
  CMFAST_SHARED(memory);
  float* gathered = reinterpret_cast<float*>(memory);
  int64_t n = blockIdx.x / p.tiles;
  int64_t start = int64_t{blockIdx.x % p.tiles} * p.tile;
  uint32_t lane = threadIdx.x * V;
  int64_t i = start + lane;
  bool active = lane < p.tile && i < CMFAST_BOUND(1, p.size);
  Noise noise = load_noise(p.seed);
  uint32_t index = noise.first_sample + static_cast<uint32_t>(n);

  float x[V], model_output[V], z[V];
  if (active) {
    load_dense<X>(p.x, n * p.x_n + i, x);
    load_dense<M>(p.model_output, n * p.model_output_n + i, model_output);
    if (p.noise) load_dense<X>(p.noise, n * p.noise_n + i, z);
  }
  if (p.channels) {
    uint32_t positions = static_cast<uint32_t>(p.size / p.channels);
    uint32_t first = static_cast<uint32_t>(start / p.channels);
    for (uint32_t q = threadIdx.x; q < p.tile / 4; q += blockDim.x) {
      uint32_t channel = q % p.channels, position = q / p.channels * 4;
      if (first + position >= positions) break;
      float four[4];
      int64_t element = int64_t{channel} * positions + first + position;
      normals(static_cast<uint32_t>(element / 4), noise.draw, noise.seed, index, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) gathered[(position + j) * p.channels + channel] = four[j];
    }
    CMFAST_SYNC(2);
  }
  if (!active) return;

  Loaded c = load_coefficients(p.coefficients, n);
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = denoise(c, x[j], model_output[j]);
  int64_t out = n * p.out_n + i;
  store_dense<X>(p.denoised, out, x);
  if (!p.sample) return;

  if (p.channels) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      float4 four = *reinterpret_cast<const float4*>(gathered + lane + j);
      z[j] = four.x, z[j + 1] = four.y, z[j + 2] = four.z, z[j + 3] = four.w;
    }
  } else if (noise.seeded) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      float four[4];
      normals(static_cast<uint32_t>((i + j) / 4), noise.draw, noise.seed, index, four);
#pragma unroll
      for (int k = 0; k < 4; ++k) z[j + k] = four[k];
    }
  }
  bool noisy = p.noise || noise.seeded;
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = c.alpha * x[j] + (noisy ? c.beta * z[j] : 0.0f);
  store_dense<X>(p.sample, out, x);
  if (!p.model_input) return;
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] *= c.input_scale;
  store_dense<M>(p.model_input, out, x);
}

struct DenseBackward {
  const void *d_denoised, *d_sample, *d_input, *x, *model_output;
  void *dx, *d_output, *d_noise;
  int64_t d_denoised_n, d_sample_n, d_input_n, x_n, model_output_n, out_n;
  int64_t size;
  uint32_t tiles;
  Coefficients coefficients;
};

template <class X, class M>
__global__ void __launch_bounds__(256) backward_dense(DenseBackward p) {
  constexpr int V = VECTOR<X, M>;
  int64_t n = blockIdx.x / p.tiles;
  int64_t i = (int64_t{blockIdx.x % p.tiles} * blockDim.x + threadIdx.x) * V;
  if (i >= CMFAST_BOUND(3, p.size)) return;
  float d_denoised[V] = {}, d_sample[V] = {}, d_input[V] = {}, x[V] = {}, model_output[V] = {};
  if (p.d_denoised) load_dense<X>(p.d_denoised, n * p.d_denoised_n + i, d_denoised);
  if (p.d_sample) load_dense<X>(p.d_sample, n * p.d_sample_n + i, d_sample);
  if (p.d_input) load_dense<M>(p.d_input, n * p.d_input_n + i, d_input);
  if (p.coefficients.clip) {
    load_dense<X>(p.x, n * p.x_n + i, x);
    load_dense<M>(p.model_output, n * p.model_output_n + i, model_output);
  }
  Loaded c = load_coefficients(p.coefficients, n);
  float dx[V], d_output[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    d_sample[j] += c.input_scale * d_input[j];
    float d = gradient(c, d_denoised[j], d_sample[j], c.a * x[j] + c.b * model_output[j]);
    dx[j] = c.a * d;
    d_output[j] = c.b * d;
    d_sample[j] *= c.beta;
  }
  int64_t out = n * p.out_n + i;
  store_dense<X>(p.dx, out, dx);
  store_dense<M>(p.d_output, out, d_output);
  if (p.d_noise) store_dense<X>(p.d_noise, out, d_sample);
}

// ---- strided

struct StridedTensor {
  const void* data;
  int dtype;
  Strides strides;
};

// The digits of element e of a sample, as a 32-bit division wherever that is enough.
__device__ __forceinline__ void digits(const Layout& layout, int64_t e, int64_t (&digit)[DIMS]) {
#pragma unroll
  for (int k = DIMS - 1; k > 0; --k) {
    digit[k] = 0;
    if (k >= layout.dims) continue;
    int64_t size = layout.sizes[k];
    if (layout.size <= INT_MAX) {
      uint32_t quotient = static_cast<uint32_t>(e) / static_cast<uint32_t>(size);
      digit[k] = e - quotient * size;
      e = quotient;
    } else {
      int64_t quotient = e / size;
      digit[k] = e - quotient * size;
      e = quotient;
    }
  }
  digit[0] = e;
}

__device__ __forceinline__ int64_t offset(const Strides& strides, int64_t n, const int64_t (&digit)[DIMS]) {
  int64_t sum = n * strides.n;
#pragma unroll
  for (int k = 0; k < DIMS; ++k) sum += digit[k] * strides.of[k];
  return sum;
}

__device__ __forceinline__ float load_strided(const StridedTensor& t, int64_t n, const int64_t (&digit)[DIMS]) {
  return load_any(t.data, t.dtype, offset(t.strides, n, digit));
}

struct StridedStep {
  Layout layout;
  StridedTensor x, model_output, noise;
  void *denoised, *sample, *model_input;
  Strides out;
  Coefficients coefficients;
  Noise seed;
};

__global__ void __launch_bounds__(256) step_strided(const StridedStep p) {
  int64_t n = blockIdx.x / p.layout.tiles;
  int64_t first = (int64_t{blockIdx.x % p.layout.tiles} * blockDim.x + threadIdx.x) * 4;
  if (first >= p.layout.size) return;
  Loaded c = load_coefficients(p.coefficients, n);
  float z[4];
  if (p.seed.seeded) {
    Noise noise = load_noise(p.seed);
    normals(static_cast<uint32_t>(first / 4), noise.draw, noise.seed, noise.first_sample + static_cast<uint32_t>(n), z);
  }
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    if (first + j >= CMFAST_BOUND(4, p.layout.size)) return;
    int64_t digit[DIMS];
    digits(p.layout, first + j, digit);
    float value = denoise(c, load_strided(p.x, n, digit), load_strided(p.model_output, n, digit));
    int64_t out = offset(p.out, n, digit);
    store_any(p.denoised, p.x.dtype, out, value);
    if (!p.sample) continue;
    value *= c.alpha;
    if (p.noise.data) value += c.beta * load_strided(p.noise, n, digit);
    else if (p.seed.seeded) value += c.beta * (j == 0 ? z[0] : j == 1 ? z[1] : j == 2 ? z[2] : z[3]);
    store_any(p.sample, p.x.dtype, out, value);
    if (p.model_input) store_any(p.model_input, p.model_output.dtype, out, c.input_scale * value);
  }
}

struct StridedBackward {
  Layout layout;
  StridedTensor d_denoised, d_sample, d_input, x, model_output;
  void *dx, *d_output, *d_noise;
  int d_noise_dtype;
  Strides out;
  Coefficients coefficients;
};

__global__ void __launch_bounds__(256) backward_strided(const StridedBackward p) {
  int64_t n = blockIdx.x / p.layout.tiles;
  int64_t i = int64_t{blockIdx.x % p.layout.tiles} * blockDim.x + threadIdx.x;
  if (i >= CMFAST_BOUND(5, p.layout.size)) return;
  Loaded c = load_coefficients(p.coefficients, n);
  int64_t digit[DIMS];
  digits(p.layout, i, digit);
  float d_sample = p.d_sample.data ? load_strided(p.d_sample, n, digit) : 0.0f;
  if (p.d_input.data) d_sample += c.input_scale * load_strided(p.d_input, n, digit);
  float d_denoised = p.d_denoised.data ? load_strided(p.d_denoised, n, digit) : 0.0f;
  float unclipped = 0;
  if (c.clip) unclipped = c.a * load_strided(p.x, n, digit) + c.b * load_strided(p.model_output, n, digit);
  float d = gradient(c, d_denoised, d_sample, unclipped);
  int64_t out = offset(p.out, n, digit);
  store_any(p.dx, p.x.dtype, out, c.a * d);
  store_any(p.d_output, p.model_output.dtype, out, c.b * d);
  if (p.d_noise) store_any(p.d_noise, p.d_noise_dtype, out, c.beta * d_sample);
}

// ---- launchers

using Order = std::vector<size_t>;

// The dimensions of a sample with more than one element, outermost in the tensor's memory first.
Order memory_order(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  Order order;
  for (size_t d = 1; d < shape.size(); ++d)
    if (shape[d] > 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// [*spatial, C] in memory.
bool channels_last(const std::vector<int64_t>& shape, const Order& order) {
  Order expected;
  for (size_t d = 2; d < shape.size(); ++d)
    if (shape[d] > 1) expected.push_back(d);
  if (expected.empty() || shape[1] == 1) return false;
  expected.push_back(1);
  return order == expected;
}

using Given = std::vector<const StepTensor*>;  // tensors that have data

Layout merge(const std::vector<int64_t>& shape, Order order, const Given& tensors) {
  Layout layout{0, 1, {}, 0};
  for (size_t d : order) layout.size *= shape[d];
  if (order.empty()) order.push_back(1);
  // `order` keeps the last dimension of each run that is merged: its strides are the run's.
  Order merged;
  for (size_t d : order) {
    bool joins = !merged.empty();
    for (const StepTensor* t : tensors)
      joins = joins && t->strides[merged.back()] == t->strides[d] * shape[d];
    if (joins) {
      layout.sizes[layout.dims - 1] *= shape[d];
      merged.back() = d;
    } else {
      if (layout.dims < DIMS) layout.sizes[layout.dims] = shape[d];
      ++layout.dims;
      merged.push_back(d);
    }
  }
  return layout;
}

// The strides of a tensor's merged dimensions.
Strides strides(const std::vector<int64_t>& shape, const Order& order, const Layout& layout, const StepTensor& t) {
  Strides result{t.data ? t.strides[0] : 0, {}};
  if (!t.data) return result;
  size_t d = 0;
  for (int k = 0; k < layout.dims; ++k) {
    int64_t run = 1;
    while (d < order.size() && run * shape[order[d]] <= layout.sizes[k]) run *= shape[order[d++]];
    result.of[k] = order.empty() ? 1 : t.strides[order[d - 1]];
  }
  return result;
}

StridedTensor strided(const std::vector<int64_t>& shape, const Order& order, const Layout& layout,
                      const StepTensor& t) {
  return {t.data, t.dtype, strides(shape, order, layout, t)};
}

// Do vectors of `vector` elements lie at multiples of their bytes (of 16 where they are more) in every sample?
bool vectors_fit(const Given& tensors, const std::vector<void*>& others, int64_t samples, int64_t vector) {
  auto fits = [&](const void* data, int64_t stride, int dtype) {
    int64_t bytes = std::min<int64_t>(16, vector * bytes_of(dtype));
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && (samples == 1 || stride * bytes_of(dtype) % bytes == 0);
  };
  for (const StepTensor* t : tensors)
    if (!fits(t->data, t->strides[0], t->dtype)) return false;
  for (const void* data : others)
    if (reinterpret_cast<uintptr_t>(data) % 16) return false;
  return true;
}

bool one_dense_dimension(const Layout& layout, const Order& order, const Given& tensors) {
  if (layout.dims != 1) return false;
  for (const StepTensor* t : tensors)
    if (!order.empty() && t->strides[order.back()] != 1) return false;
  return true;
}

std::string check(const std::vector<int64_t>& shape, const Given& tensors) {
  if (shape.size() < 2) return "x has fewer than two dimensions";
  for (int64_t size : shape)
    if (size < 1) return "x has no elements";
  for (const StepTensor* t : tensors) {
    if (t->strides.size() != shape.size()) return "a tensor has not as many strides as x has dimensions";
    if (t->dtype < FLOAT32 || t->dtype > BFLOAT16) return "a tensor has the unknown dtype " + std::to_string(t->dtype);
  }
  return {};
}

std::string check_blocks(int64_t samples, int64_t tiles) {
  return samples * tiles > INT_MAX ? "x has too many elements for one launch" : std::string();
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned threads_for(int64_t elements, int64_t vector) {
  return elements / vector / 256 < MANY_BLOCKS ? 64 : 256;
}

// Call `serve` with the kernel's types of x and model_output; false where there is no dense kernel for them.
template <class Serve>
bool with_types(int x, int model_output, Serve serve) {
  if (x == FLOAT32 && model_output == FLOAT32) serve(float{}, float{});
  else if (x == FLOAT32 && model_output == FLOAT16) serve(float{}, __half{});
  else if (x == FLOAT32 && model_output == BFLOAT16) serve(float{}, __nv_bfloat16{});
  else if (x == FLOAT16 && model_output == FLOAT16) serve(__half{}, __half{});
  else if (x == BFLOAT16 && model_output == BFLOAT16) serve(__nv_bfloat16{}, __nv_bfloat16{});
  else return false;
  return true;
}

}  // namespace

std::string consistency_step(const StepArguments& p, void* stream) {
  Given tensors{&p.x, &p.model_output, &p.out};
  if (p.noise.data) tensors.push_back(&p.noise);
  if (std::string wrong = check(p.shape, tensors); !wrong.empty()) return wrong;
  int64_t samples = p.shape[0];
  Noise seed = p.seed;
  seed.seeded = seed.seeded && p.sample;

  Order order = memory_order(p.shape, p.x.strides), logical = order;
  std::sort(logical.begin(), logical.end());
  Layout layout = merge(p.shape, order, tensors);
  int64_t channels = 0;
  if (seed.seeded && order != logical) {
    if (channels_last(p.shape, order) && layout.size / p.shape[1] % 4 == 0 && p.shape[1] <= GATHERED_CHANNELS)
      channels = p.shape[1];
  }

  int64_t vector = p.x.dtype != FLOAT32 && p.model_output.dtype != FLOAT32 ? 8 : 4;
  bool dense = one_dense_dimension(layout, order, tensors) && layout.size % vector == 0 &&
               (!seed.seeded || channels || order == logical) && (!p.noise.data || p.noise.dtype == p.x.dtype) &&
               vectors_fit(tensors, {p.sample, p.model_input}, samples, vector);
  if (dense) {
    unsigned threads = threads_for(samples * layout.size, vector);
    int64_t tile = threads * vector;
    if (channels) {
      // Tiles begin at multiples of 32 bytes, the unit in which memory is moved, where that leaves any positions.
      int64_t aligned = tile / channels / (2 * vector) * (2 * vector);
      tile = std::max(aligned, vector) * channels;
    }
    threads = static_cast<unsigned>(divide_up(tile / vector, 32) * 32);
    int64_t tiles = divide_up(layout.size, tile);
    if (std::string wrong = check_blocks(samples, tiles); !wrong.empty()) return wrong;
    DenseStep step{p.x.data,           p.model_output.data,
                   p.noise.data,       p.out.data,
                   p.sample,           p.model_input,
                   p.x.strides[0],     p.model_output.strides[0],
                   p.noise.data ? p.noise.strides[0] : 0,
                   p.out.strides[0],   layout.size,
                   static_cast<uint32_t>(tiles),    static_cast<uint32_t>(tile),
                   static_cast<uint32_t>(channels), p.coefficients,
                   seed};
    size_t shared_bytes = channels ? static_cast<size_t>(tile) * sizeof(float) : 0;
    LaunchConfig config{dim3(static_cast<unsigned>(samples * tiles)), dim3(threads), shared_bytes, stream};
    std::string error;
    bool served = with_types(p.x.dtype, p.model_output.dtype, [&](auto x, auto m) {
      error = launch(step_dense<decltype(x), decltype(m)>, config, step);
    });
    if (served) return error;
  }

  if (seed.seeded) {
    order = logical;
    layout = merge(p.shape, order, tensors);
  }
  if (layout.dims > DIMS) return "x has more than " + std::to_string(DIMS) + " dimensions that do not merge";
  int64_t tiles = divide_up(layout.size, 4 * 128);
  if (std::string wrong = check_blocks(samples, tiles); !wrong.empty()) return wrong;
  layout.tiles = static_cast<uint32_t>(tiles);
  StridedStep step{layout,
                   strided(p.shape, order, layout, p.x),
                   strided(p.shape, order, layout, p.model_output),
                   strided(p.shape, order, layout, p.noise),
                   p.out.data,
                   p.sample,
                   p.model_input,
                   strides(p.shape, order, layout, p.out),
                   p.coefficients,
                   seed};
  return launch(step_strided, LaunchConfig{dim3(static_cast<unsigned>(samples * tiles)), dim3(128), 0, stream}, step);
}

std::string consistency_step_backward(const StepBackwardArguments& p, void* stream) {
  Given tensors{&p.out};
  for (const StepTensor* t : {&p.d_denoised, &p.d_sample, &p.d_input})
    if (t->data) tensors.push_back(t);
  if (p.coefficients.clip) {
    tensors.push_back(&p.x);
    tensors.push_back(&p.model_output);
  }
  if (std::string wrong = check(p.shape, tensors); !wrong.empty()) return wrong;
  int64_t samples = p.shape[0];
  Order order = memory_order(p.shape, p.out.strides);
  Layout layout = merge(p.shape, order, tensors);
  int x_dtype = p.x.dtype, model_dtype = p.model_output.dtype;
  int64_t vector = x_dtype != FLOAT32 && model_dtype != FLOAT32 ? 8 : 4;
  bool dense = one_dense_dimension(layout, order, tensors) && layout.size % vector == 0 &&
               (!p.d_noise || p.d_noise_dtype == x_dtype) &&
               vectors_fit(tensors, {p.d_output, p.d_noise}, samples, vector);
  for (const StepTensor* t : {&p.d_denoised, &p.d_sample}) dense = dense && (!t->data || t->dtype == x_dtype);
  dense = dense && (!p.d_input.data || p.d_input.dtype == model_dtype);
  auto stride_n = [](const StepTensor& t) { return t.data ? t.strides[0] : 0; };
  if (dense) {
    unsigned threads = threads_for(samples * layout.size, vector);
    int64_t tiles = divide_up(layout.size, threads * vector);
    if (std::string wrong = check_blocks(samples, tiles); !wrong.empty()) return wrong;
    DenseBackward step{p.d_denoised.data, p.d_sample.data,     p.d_input.data,       p.x.data,
                       p.model_output.data, p.out.data,        p.d_output,           p.d_noise,
                       stride_n(p.d_denoised), stride_n(p.d_sample), stride_n(p.d_input), stride_n(p.x),
                       stride_n(p.model_output), p.out.strides[0], layout.size, static_cast<uint32_t>(tiles),
                       p.coefficients};
    LaunchConfig config{dim3(static_cast<unsigned>(samples * tiles)), dim3(threads), 0, stream};
    std::string error;
    bool served = with_types(x_dtype, model_dtype, [&](auto x, auto m) {
      error = launch(backward_dense<decltype(x), decltype(m)>, config, step);
    });
    if (served) return error;
  }
  if (layout.dims > DIMS) return "x has more than " + std::to_string(DIMS) + " dimensions that do not merge";
  int64_t tiles = divide_up(layout.size, 128);
  if (std::string wrong = check_blocks(samples, tiles); !wrong.empty()) return wrong;
  layout.tiles = static_cast<uint32_t>(tiles);
  auto with = [&](const StepTensor& t) { return strided(p.shape, order, layout, t); };
  StridedTensor none_x{nullptr, x_dtype, {}}, none_output{nullptr, model_dtype, {}};
  StridedBackward step{layout,
                       with(p.d_denoised),
                       with(p.d_sample),
                       with(p.d_input),
                       p.coefficients.clip ? with(p.x) : none_x,
                       p.coefficients.clip ? with(p.model_output) : none_output,
                       p.out.data,
                       p.d_output,
                       p.d_noise,
                       p.d_noise_dtype,
                       strides(p.shape, order, layout, p.out),
                       p.coefficients};
  return launch(backward_strided, LaunchConfig{dim3(static_cast<unsigned>(samples * tiles)), dim3(128), 0, stream},
                step);
}

}  // namespace cmfast
