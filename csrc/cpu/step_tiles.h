// Samples of tensors of any strides, read and written in tiles of floats.
//
// What lies in memory in the order of the tiles is read and written by whole registers; anything else, slices and
// broadcasts and tensors of different formats, by runs along its innermost dimension.
#pragma once

#include "consistency.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

constexpr int TILE = 1024;  // a multiple of four registers

// A sample's merged dimensions, outermost first in the memory of one tensor.
struct Layout {
  int dims;
  int64_t size, sizes[MAX_DIMS];
  bool natural;  // [C, *spatial] order
};

// A tensor of such samples.
struct Source {
  void* data;
  int dtype;
  int64_t n, strides[MAX_DIMS];
  bool dense;  // a sample's elements lie in the layout's order, one beside the other
};

// The dimensions in the order of `key`, those merged that are adjacent in every tensor's memory.
static Layout merge(int all_dims, const int64_t* shape, const StepTensor& key, Source* const* sources,
                    const StepTensor* const* tensors, int count) {
  int order[MAX_DIMS], dims = 0;
  Layout layout{0, 1, {}, true};
  for (int d = 1; d < all_dims; ++d) {
    if (shape[d] == 1) continue;
    int i = dims++;
    for (; i > 0 && key.strides[order[i - 1]] < key.strides[d]; --i) order[i] = order[i - 1];
    layout.natural &= i == dims - 1;
    order[i] = d;
    layout.size *= shape[d];
  }
  for (int i = 0; i < dims; ++i) {
    int d = order[i], last = layout.dims - 1;
    bool adjacent = last >= 0;
    for (int t = 0; adjacent && t < count; ++t)
      adjacent = sources[t]->strides[last] == tensors[t]->strides[d] * shape[d];
    int to = adjacent ? last : layout.dims++;
    layout.sizes[to] = (adjacent ? layout.sizes[to] : 1) * shape[d];
    for (int t = 0; t < count; ++t) sources[t]->strides[to] = tensors[t]->strides[d];
  }
  if (!layout.dims) {
    layout.dims = 1;
    layout.sizes[0] = 1;
    for (int t = 0; t < count; ++t) sources[t]->strides[0] = 1;
  }
  for (int t = 0; t < count; ++t) {
    int64_t adjacent = 1;
    sources[t]->dense = true;
    for (int d = layout.dims - 1; d >= 0; adjacent *= layout.sizes[d--])
      sources[t]->dense &= sources[t]->strides[d] == adjacent;
  }
  return layout;
}

// Call use(element, stride, position, length) for each run along the innermost dimension of a tile; for the whole tile,
// where it lies in one run.
template <class Use>
CMFAST_INLINE void for_runs(const Layout& layout, const Source& source, int64_t n, int64_t start, int64_t count,
                            Use use) {
  if (source.dense) return use(n * source.n + start, 1, 0, count);
  int64_t digits[MAX_DIMS], rest = start;
  int inner = layout.dims - 1;
  for (int d = inner; d >= 0; --d) {
    digits[d] = rest % layout.sizes[d];
    rest /= layout.sizes[d];
  }
  for (int64_t done = 0; done < count;) {
    int64_t element = n * source.n, length = layout.sizes[inner] - digits[inner];
    for (int d = 0; d <= inner; ++d) element += digits[d] * source.strides[d];
    if (length > count - done) length = count - done;
    use(element, source.strides[inner], done, length);
    done += length;
    digits[inner] += length;
    for (int d = inner; d > 0 && digits[d] == layout.sizes[d]; --d) {
      digits[d] = 0;
      ++digits[d - 1];
    }
  }
}

static void read(const Layout& layout, const Source& source, int64_t n, int64_t start, int64_t count, float* tile) {
  for_runs(layout, source, n, start, count, [&](int64_t element, int64_t stride, int64_t position, int64_t length) {
    for (int64_t i = 0; i < length; i += LANES) {
      int lanes = (int)(length - i < LANES ? length - i : LANES);
      Floats x = gather(source.data, source.dtype, element + i * stride, stride, lanes);
      lanes == LANES ? store(tile + position + i, x) : store(tile + position + i, x, lanes);
    }
  });
}

static void write(const Layout& layout, const Source& to, int64_t n, int64_t start, int64_t count, const float* tile) {
  for_runs(layout, to, n, start, count, [&](int64_t element, int64_t stride, int64_t position, int64_t length) {
    for (int64_t i = 0; i < length; i += LANES) {
      int lanes = (int)(length - i < LANES ? length - i : LANES);
      scatter(to.data, to.dtype, element + i * stride, stride, load(tile + position + i, lanes), lanes);
    }
  });
}

static inline Source source(const StepTensor& t) { return {t.data, t.dtype, t.strides[0], {}, false}; }

static inline float coefficient(const Coefficient& c, int64_t n) {
  return c.vector ? c.vector[n * c.stride] : c.scalar;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
