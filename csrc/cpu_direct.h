// Operators of torch's tensors as they are, where nothing has to be prepared: see kernels/direct.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu/attention.h"
#include "cpu/consistency.h"
#include "cpu/group_norm.h"
#include "cpu/isa.h"
#include "torch_tensors.h"

namespace cmfast {

// Whether the kernels run here, and the environment leaves the choice of a backend to the rule, which takes the CPU's
// kernels for CPU tensors.
inline bool serves_by_default() {
  if (!kernels()) return false;
  const char *named = std::getenv("CMFAST_BACKEND"), *gpu = std::getenv("CMFAST_GPU_ON_CPU");
  return (!named || !*named || std::string_view(named) == "auto") && (!gpu || std::string_view(gpu) != "1");
}

// What a tensor is that has elements in the processor's memory.
inline std::optional<dlpack::Tensor> described(py::handle tensor) {
  static const Describe describe = describer();
  dlpack::Tensor found;
  constexpr int cpu = 1;
  if (!describe || describe(tensor.ptr(), &found)) {
    PyErr_Clear();  // a tensor that DLPack cannot describe
    return {};
  }
  if (found.device_type != cpu || found.lanes != 1 || !found.data) return {};
  found.data = (char*)found.data + found.byte_offset;
  return found;
}

// The code of kernels/native.py; -1 for dtypes that the kernels do not have.
inline int dtype_code(const dlpack::Tensor& t) {
  constexpr int floating = 2, bfloat = 4;
  if (t.code == floating && t.bits == 32) return FLOAT32;
  if (t.code == floating && t.bits == 16) return FLOAT16;
  return t.code == bfloat && t.bits == 16 ? BFLOAT16 : -1;
}

inline int64_t positions_of(const dlpack::Tensor& t) {
  int64_t product = 1;
  for (int d = 2; d < t.ndim; ++d) product *= t.shape[d];
  return product;
}

// [N, C, *spatial] as [N, C, P]: where one stride leads through the positions, the last dimension innermost.
inline std::optional<NormTensor> planes_of(const dlpack::Tensor& t) {
  int64_t stride = 0, span = 0;
  for (int d = t.ndim - 1; d >= 2; --d) {
    if (t.shape[d] == 1) continue;
    if (!stride) stride = t.strides[d];
    else if (t.strides[d] != span) return {};
    span = t.strides[d] * t.shape[d];
  }
  int64_t channels = t.shape[1];
  return NormTensor{t.data, channels, t.strides[0], channels > 1 ? t.strides[1] : 1, positions_of(t) > 1 ? stride : 1};
}

inline float from_bfloat16(uint16_t half) {
  uint32_t word = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// A float32 or bfloat16 row [C], or where there are samples rows [N, C], with adjacent channels. None is none. Those of
// bfloat16 are converted into `kept`.
inline bool read_row(py::handle tensor, int64_t samples, int64_t channels, NormRow* row, std::vector<float>* kept) {
  if (tensor.is_none()) return true;
  std::optional<dlpack::Tensor> t = described(tensor);
  int dims = samples ? 2 : 1;
  if (!t || (dtype_code(*t) != FLOAT32 && dtype_code(*t) != BFLOAT16) || t->ndim != dims || t->shape[dims - 1] != channels) return false;
  if (samples && t->shape[0] != samples) return false;
  if (channels > 1 && t->strides[dims - 1] != 1) return false;
  if (dtype_code(*t) == FLOAT32) {
    *row = {(const float*)t->data, samples ? t->strides[0] : 0};
    return true;
  }
  const int64_t rows = samples ? samples : 1;
  kept->resize(rows * channels);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t c = 0; c < channels; ++c)
      (*kept)[n * channels + c] = from_bfloat16(((const uint16_t*)t->data)[(samples ? n * t->strides[0] : 0) + c]);
  *row = {kept->data(), samples ? channels : 0};
  return true;
}

// The arguments of the kernel, without its means and deviations; none where the tensors are not as it takes them. `kept`
// is to live as long as they do.
inline std::optional<NormArguments> norm_arguments(py::handle y, py::handle h, py::handle skip, int64_t groups,
                                                   const std::array<py::handle, 5>& rows,
                                                   std::array<std::vector<float>, 5>* kept) {
  NormArguments p;
  bool channels_adjoin = true, positions_adjoin = true;
  std::optional<dlpack::Tensor> first = described(h);
  if (!first || first->ndim < 2) return {};
  auto read = [&](py::handle tensor, NormTensor* into) {
    std::optional<dlpack::Tensor> t = described(tensor);
    if (!t || t->ndim != first->ndim || dtype_code(*t) != dtype_code(*first) || t->shape[0] != first->shape[0])
      return false;
    for (int d = 2; d < t->ndim; ++d)
      if (t->shape[d] != first->shape[d]) return false;
    std::optional<NormTensor> found = planes_of(*t);
    if (!found) return false;
    channels_adjoin &= found->c == 1;
    positions_adjoin &= found->p == 1;
    *into = *found;
    return true;
  };
  if (!read(h, &p.h) || !read(y, &p.y) || (!skip.is_none() && !read(skip, &p.skip))) return {};
  int64_t channels = p.h.channels + p.skip.channels;
  p.samples = first->shape[0];
  p.positions = positions_of(*first);
  p.groups = groups;
  p.dtype = dtype_code(*first);
  if (p.dtype < 0 || p.y.channels != channels || groups < 1 || channels % groups) return {};
  if (!(channels_adjoin || positions_adjoin) || p.samples * channels * p.positions == 0) return {};
  NormRow* each[] = {&p.weight, &p.bias, &p.add, &p.scale, &p.shift};
  for (int i = 0; i < 5; ++i)
    if (!read_row(rows[i], i < 2 ? 0 : p.samples, channels, each[i], &(*kept)[i])) return {};
  return p;
}

inline bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// The arguments of the kernel, without where it writes the log-sum-exp; none where the tensors are not as it takes them.
inline std::optional<AttentionArguments> attention_arguments(py::handle out, py::handle q, py::handle k, py::handle v) {
  const py::handle given[] = {out, q, k, v};
  AttentionArguments p;
  AttentionTensor* into[] = {&p.out, &p.q, &p.k, &p.v};
  std::optional<dlpack::Tensor> t[4];
  for (int i = 0; i < 4; ++i) {
    t[i] = described(given[i]);
    if (!t[i] || t[i]->ndim != 4 || dtype_code(*t[i]) < 0 || dtype_code(*t[i]) != dtype_code(*t[0])) return {};
    const int64_t* strides = t[i]->strides;
    *into[i] = {t[i]->data, strides[0], strides[1], strides[2], strides[3]};
  }
  const int64_t *queries = t[1]->shape, *keys = t[2]->shape;
  if (!same_shape(*t[0], *t[1]) || !same_shape(*t[2], *t[3])) return {};
  if (queries[0] != keys[0] || queries[1] != keys[1] || queries[3] != keys[3]) return {};
  p.samples = queries[0], p.heads = queries[1], p.queries = queries[2], p.keys = keys[2], p.head_size = queries[3];
  if (p.samples * p.heads * p.queries * p.keys * p.head_size == 0) return {};
  p.dtype = dtype_code(*t[0]);
  return p;
}

// A float, or a float32 tensor [N].
inline bool read_coefficient(py::handle given, int64_t samples, Coefficient* into) {
  if (PyFloat_Check(given.ptr())) {
    into->scalar = (float)PyFloat_AS_DOUBLE(given.ptr());
    return true;
  }
  std::optional<dlpack::Tensor> t = described(given);
  if (!t || t->ndim != 1 || t->shape[0] != samples || dtype_code(*t) != FLOAT32) return false;
  into->vector = (const float*)t->data;
  into->stride = t->strides[0];
  return true;
}

// The arguments of the kernel without its range and its noise's seed; none where the tensors are not as it takes them.
// Of `tensors` (x, model_output, noise, denoised, sample, model_input) some may be None; `coefficients` are a, b, alpha,
// beta and input_scale.
inline std::optional<StepArguments> step_arguments(const std::array<py::handle, 6>& tensors,
                                                   const std::array<py::handle, 5>& coefficients) {
  StepArguments p;
  StepTensor* into[] = {&p.x, &p.model_output, &p.noise, &p.denoised, &p.sample, &p.model_input};
  std::optional<dlpack::Tensor> first;
  for (int i = 0; i < 6; ++i) {
    if (tensors[i].is_none()) continue;
    std::optional<dlpack::Tensor> t = described(tensors[i]);
    if (!t || t->ndim > MAX_DIMS || t->ndim < 2 || dtype_code(*t) < 0) return {};
    if (!first) first = t;
    if (!same_shape(*t, *first)) return {};
    into[i]->data = t->data;
    into[i]->dtype = dtype_code(*t);
    std::copy(t->strides, t->strides + t->ndim, into[i]->strides);
  }
  p.dims = first->ndim;
  std::copy(first->shape, first->shape + first->ndim, p.shape);
  Coefficient* each[] = {&p.a, &p.b, &p.alpha, &p.beta, &p.input_scale};
  for (int i = 0; i < 5; ++i)
    if (!read_coefficient(coefficients[i], p.shape[0], each[i])) return {};
  return p;
}

}  // namespace cmfast
