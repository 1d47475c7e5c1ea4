// Convolution of torch's tensors as they are, with prepared weights: see kernels/direct.
#pragma once

#include "../cpu/conv.h"
#include "tensors.h"

namespace cmfast {

// Packed weights begin with a cache line that says how they lie: whoever reads them may be another instruction set, or
// another processor.
constexpr int64_t HEADER_WORDS = 16;
constexpr uint32_t PLAIN_HEADER = 0x636D7031, TILED_HEADER = 0x636D7431;

// What `pack` wrote, behind its header: into the shape goes how it lies. False where it is something else.
inline bool read_weights(const uint32_t* packed, ConvArguments* p) {
  if (*packed != PLAIN_HEADER && *packed != TILED_HEADER) return false;
  p->shape.tiles = *packed == TILED_HEADER;
  p->weights = packed + HEADER_WORDS;
  return true;
}

// What belongs to a call of the operator beside its tensors; stride and padding are tuples, of one and of two numbers for
// each spatial dimension.
struct ConvOptions {
  int tile;
  bool transformed, pairs;
  py::tuple stride, padding;
  int resample, gate, residual_resample;
  bool silu, relu;
};

// Its tensors; those that are not given are None, out and moments are empty ones.
struct ConvHandles {
  py::handle out, moments, h, skip, weight, bias, packed, gain, offset, residual;
};

// The sizes of depth, height and width, those of dimensions that are not there 1.
struct Extent {
  int64_t z = 1, y = 1, x = 1;
  explicit Extent(const dlpack::Tensor& t) : Extent(t.shape + 2, t.ndim - 2) {}
  Extent(const int64_t* sizes, int dims) : x(sizes[dims - 1]) {
    if (dims > 1) y = sizes[dims - 2];
    if (dims > 2) z = sizes[dims - 3];
  }
};

// An image whose channels are adjacent.
inline bool read_image(const dlpack::Tensor& t, ConvTensor* into) {
  if (t.ndim < 3 || t.ndim > 5 || dtype_code(t) < 0 || (t.shape[1] > 1 && t.strides[1] != 1)) return false;
  const int64_t* end = t.strides + t.ndim;
  *into = {t.data, t.shape[1], t.strides[0], t.ndim > 4 ? end[-3] : 0, t.ndim > 3 ? end[-2] : 0, end[-1]};
  return true;
}

// Rows [N, C] that follow one another; None is none.
inline bool read_all_rows(py::handle tensor, int64_t samples, int64_t channels, int place, const float** into) {
  NormRow row;
  if (!read_row(tensor, samples, channels, &row, kept_row(place))) return false;
  *into = row.data;
  return samples <= 1 || !row.data || row.stride == channels;
}

inline int64_t resampled(int64_t size, int how) {
  return how == RESAMPLE_UP ? 2 * size : how == RESAMPLE_POOL ? size / 2 : size;
}

// Whether the sizes of `t` are those of the output once it is resampled, which a video's depth is not.
inline bool resamples_to(const dlpack::Tensor& t, int how, const dlpack::Tensor& out) {
  if (t.ndim != out.ndim) return false;
  for (int d = 2; d < t.ndim; ++d)
    if (resampled(t.shape[d], t.ndim == 5 && d == 2 ? RESAMPLE_NONE : how) != out.shape[d]) return false;
  return true;
}

// h, and the second of a pair: more channels, or with a gate a tensor of the same shape.
inline bool read_inputs(const ConvHandles& of, const dlpack::Tensor& h, ConvArguments* p) {
  if (!read_image(h, &p->h)) return false;
  if (of.skip.is_none()) return p->gate == GATE_NONE;
  std::optional<dlpack::Tensor> skip = described(of.skip);
  if (!skip || !same_but_channels(*skip, h) || !read_image(*skip, &p->skip)) return false;
  return p->gate == GATE_NONE || (same_shape(*skip, h) && of.gain.is_none() && of.offset.is_none() && !p->silu);
}

inline bool read_residual(const ConvHandles& of, const dlpack::Tensor& out, ConvArguments* p) {
  if (of.residual.is_none()) return p->residual_resample == RESAMPLE_NONE;
  std::optional<dlpack::Tensor> residual = described(of.residual);
  return residual && residual->shape[0] == out.shape[0] && residual->shape[1] == out.shape[1] &&
         dtype_code(*residual) == dtype_code(out) && resamples_to(*residual, p->residual_resample, out) &&
         read_image(*residual, &p->residual);
}

inline bool read_numbers(const py::tuple& given, int count, int* into) {
  if (PyTuple_GET_SIZE(given.ptr()) != count) return false;
  for (int i = 0; i < count; ++i) {
    PyObject* number = PyTuple_GET_ITEM(given.ptr(), i);
    if (!PyLong_Check(number)) return false;
    into[i] = (int)PyLong_AsLong(number);
  }
  return true;
}

// Those of a convolution of so many spatial dimensions, the last of which is that of x.
inline bool set_options(const ConvOptions& options, int dims, ConvArguments* p) {
  int stride[3] = {1, 1, 1}, padding[6] = {};
  if (!read_numbers(options.stride, dims, stride + 3 - dims)) return false;
  if (!read_numbers(options.padding, 2 * dims, padding + 6 - 2 * dims)) return false;
  p->stride_z = stride[0], p->stride_y = stride[1], p->stride_x = stride[2];
  p->front = padding[0], p->top = padding[2], p->left = padding[4];
  p->resample = options.resample;
  p->residual_resample = options.residual_resample;
  p->gate = options.gate;
  p->silu = options.silu;
  p->relu = options.relu;
  return true;
}

// The arguments of the kernel; none where the tensors are not as it takes them. The sizes of out are those that the
// operator gives.
inline std::optional<ConvArguments> conv_arguments(const ConvHandles& of, const ConvOptions& options) {
  ConvArguments p;
  std::optional<dlpack::Tensor> h = described(of.h), out = described(of.out), weight = described(of.weight),
                                packed = described(of.packed);
  if (!h || !out || !weight || !packed || dtype_code(*weight) < 0 || weight->ndim != h->ndim) return {};
  int dims = h->ndim - 2;
  if (dims < 1 || dims > 3 || !set_options(options, dims, &p)) return {};
  if (!read_inputs(of, *h, &p) || !read_image(*out, &p.out) || !read_residual(of, *out, &p)) return {};
  Extent kernel(*weight), in(*h), outputs(*out);
  p.shape = {weight->shape[1], weight->shape[0], (int)kernel.z, (int)kernel.y, (int)kernel.x,
             options.tile, options.transformed, options.pairs, false};
  if (!read_weights((const uint32_t*)packed->data, &p)) return {};
  p.samples = h->shape[0];
  p.depth = in.z, p.height = in.y, p.width = in.x;
  // The rows of a one-dimensional image are all the same one, so that it is resampled as others are.
  if (dims == 1 && p.resample == RESAMPLE_POOL) p.height = 2;
  p.out_depth = outputs.z, p.out_height = outputs.y, p.out_width = outputs.x;
  p.dtype = dtype_code(*h);
  NormRow bias;
  int64_t channels = p.channels();
  if (channels != p.shape.in_channels || of.gain.is_none() != of.offset.is_none()) return {};
  if (!read_all_rows(of.gain, p.samples, channels, 0, &p.gain)) return {};
  if (!read_all_rows(of.offset, p.samples, channels, 1, &p.offset)) return {};
  if (!read_row(of.bias, 0, p.shape.out_channels, &bias, kept_row(2))) return {};
  p.bias = bias.data;
  if (of.moments.is_none()) return p;
  std::optional<dlpack::Tensor> moments = described(of.moments);
  if (!moments) return {};
  p.moments = (float*)moments->data;
  return p;
}

}  // namespace cmfast
