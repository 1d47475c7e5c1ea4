// What torch's tensors are, as the kernels take them: where nothing has to be prepared. See kernels/direct.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "../cpu/group_norm.h"
#include "../cpu/isa.h"
#include "../torch_tensors.h"

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

inline bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Whether two tensors [N, C, *spatial] differ in the number of channels at most.
inline bool same_but_channels(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.ndim == b.ndim && a.ndim >= 2 && a.shape[0] == b.shape[0] && dtype_code(a) == dtype_code(b) &&
         std::equal(a.shape + 2, a.shape + a.ndim, b.shape + 2);
}

// Whether elements follow one another in memory, the last dimension innermost.
inline bool contiguous(const dlpack::Tensor& t) {
  int64_t span = 1;
  for (int d = t.ndim - 1; d >= 0; span *= t.shape[d--])
    if (t.shape[d] > 1 && t.strides[d] != span) return false;
  return true;
}

inline int64_t positions_of(const dlpack::Tensor& t) {
  int64_t product = 1;
  for (int d = 2; d < t.ndim; ++d) product *= t.shape[d];
  return product;
}

// [N, C, *spatial] as [N, C, P]: where one stride leads through the positions, the last dimension innermost.
inline std::optional<NormTensor> planes_of(const dlpack::Tensor& t) {
  int64_t stride = 0, span = 0;
  bool found = false;  // the stride, which is 0 of positions that are all the same one
  for (int d = t.ndim - 1; d >= 2; --d) {
    if (t.shape[d] == 1) continue;
    if (!found) stride = t.strides[d], found = true;
    else if (t.strides[d] != span) return {};
    span = t.strides[d] * t.shape[d];
  }
  int64_t channels = t.shape[1];
  return NormTensor{t.data, channels, t.strides[0], channels > 1 ? t.strides[1] : 1, positions_of(t) > 1 ? stride : 1};
}

// Reads tensors that differ in the number of channels at most, the first of which is that of the first call.
class PlanesReader {
 public:
  bool read(py::handle tensor, NormTensor* into) {
    std::optional<dlpack::Tensor> t = described(tensor);
    if (!t || t->ndim < 2 || dtype_code(*t) < 0) return false;
    if (!first_) first_ = t;
    std::optional<NormTensor> found = same_but_channels(*t, *first_) ? planes_of(*t) : std::nullopt;
    if (!found) return false;
    channels_adjoin_ &= found->c == 1;
    positions_adjoin_ &= found->p == 1;
    *into = *found;
    return true;
  }

  int64_t samples() const { return first_->shape[0]; }
  int64_t positions() const { return positions_of(*first_); }
  int dtype() const { return dtype_code(*first_); }
  bool channels_adjoin() const { return channels_adjoin_; }  // of all tensors
  bool positions_adjoin() const { return positions_adjoin_; }

 private:
  std::optional<dlpack::Tensor> first_;
  bool channels_adjoin_ = true, positions_adjoin_ = true;
};

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
  if (!t || (dtype_code(*t) != FLOAT32 && dtype_code(*t) != BFLOAT16)) return false;
  if (t->ndim != dims || t->shape[dims - 1] != channels) return false;
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

// What `read_row` converts, of the tensors of a call: it lives as long as the thread.
inline std::vector<float>* kept_row(int place) {
  thread_local std::vector<float> rows[5];
  return &rows[place];
}

// The rows of a group norm, of tensors: weight, bias, add, scale, shift.
template <class Arguments>
bool read_rows(const py::handle (&rows)[5], int64_t samples, int64_t channels, Arguments* p) {
  NormRow* each[] = {&p->weight, &p->bias, &p->add, &p->scale, &p->shift};
  for (int i = 0; i < 5; ++i)
    if (!read_row(rows[i], i < 2 ? 0 : samples, channels, each[i], kept_row(i))) return false;
  return true;
}

}  // namespace cmfast
