// The consistency step, in one pass over the sample:
//
//     denoised    = clip(a · x + b · model_output)
//     sample      = alpha · denoised + beta · z
//     model_input = input_scale · sample
//
// A thread has tiles of a sample, in the order of `denoised` in memory. What lies in memory as it does is read and
// written by whole registers; anything else, slices and broadcasts and tensors of different formats, by runs along its
// innermost dimension, through a tile of floats. The noise of elements 4k to 4k + 3 in [C, *spatial] order comes from
// one Philox block: where `denoised` lies in that order, a tile's noise is made where it is used. Elsewhere, as in
// channels-last samples, it is made first, into a tensor of its own.
#include "../isa.h"
#include "../philox.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int TILE = 1024;  // a multiple of four registers

// A sample's merged dimensions, outermost first in the memory of `denoised`.
struct Layout {
  int dims;
  int64_t size, sizes[MAX_DIMS];
  bool natural;  // [C, *spatial] order
};

struct Source {
  void* data;
  int dtype;
  int64_t n, strides[MAX_DIMS];
  bool dense;  // a sample's elements lie in the layout's order, one beside the other
};

struct Loaded {
  float a, b, alpha, beta, input_scale;
};

float coefficient(const Coefficient& c, int64_t n) { return c.vector ? c.vector[n * c.stride] : c.scalar; }

// The dimensions in the order of `denoised`, those merged that are adjacent in every tensor's memory.
Layout merge(const StepArguments& p, Source* const* sources, const StepTensor* const* tensors, int count) {
  int order[MAX_DIMS], dims = 0;
  const int64_t* key = p.denoised.strides;
  Layout layout{0, 1, {}, true};
  for (int d = 1; d < p.dims; ++d) {
    if (p.shape[d] == 1) continue;
    int i = dims++;
    for (; i > 0 && key[order[i - 1]] < key[d]; --i) order[i] = order[i - 1];
    layout.natural &= i == dims - 1;
    order[i] = d;
    layout.size *= p.shape[d];
  }
  for (int i = 0; i < dims; ++i) {
    int d = order[i], last = layout.dims - 1;
    bool adjacent = last >= 0;
    for (int t = 0; adjacent && t < count; ++t)
      adjacent = sources[t]->strides[last] == tensors[t]->strides[d] * p.shape[d];
    int to = adjacent ? last : layout.dims++;
    layout.sizes[to] = (adjacent ? layout.sizes[to] : 1) * p.shape[d];
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

void read(const Layout& layout, const Source& source, int64_t n, int64_t start, int64_t count, float* tile) {
  for_runs(layout, source, n, start, count, [&](int64_t element, int64_t stride, int64_t position, int64_t length) {
    for (int64_t i = 0; i < length; i += LANES) {
      int lanes = (int)(length - i < LANES ? length - i : LANES);
      Floats x = gather(source.data, source.dtype, element + i * stride, stride, lanes);
      lanes == LANES ? store(tile + position + i, x) : store(tile + position + i, x, lanes);
    }
  });
}

void write(const Layout& layout, const Source& to, int64_t n, int64_t start, int64_t count, const float* tile) {
  for_runs(layout, to, n, start, count, [&](int64_t element, int64_t stride, int64_t position, int64_t length) {
    for (int64_t i = 0; i < length; i += LANES) {
      int lanes = (int)(length - i < LANES ? length - i : LANES);
      scatter(to.data, to.dtype, element + i * stride, stride, load(tile + position + i, lanes), lanes);
    }
  });
}

struct Step {
  const StepArguments& p;
  Layout layout;
  Source x, model_output, noise, denoised, sample, model_input;

  void tile(int64_t n, int64_t start) const {
    alignas(64) float first[TILE], second[TILE], z[TILE];
    int64_t count = layout.size - start < TILE ? layout.size - start : TILE;
    if (FAULT(last_tile_short) && count < TILE) --count;
    Loaded c = {coefficient(p.a, n), coefficient(p.b, n), coefficient(p.alpha, n), coefficient(p.beta, n),
                coefficient(p.input_scale, n)};
    read(layout, x, n, start, count, first);
    Source other = model_output;
    if (FAULT(strides_of_x)) __builtin_memcpy(other.strides, x.strides, sizeof x.strides), other.dense = x.dense;
    read(layout, other, n, start, count, second);
    bool noisy = noise.data || p.seeded;
    if (noise.data) read(layout, noise, n, start, count, z);
    else if (p.seeded) normals(z, start, count, p.draw, p.seed, p.first_sample + (uint32_t)n);
    for (int64_t i = 0; i < count; i += LANES) {
      Floats value = c.a * load(first + i) + c.b * load(second + i);
      if (p.clip) value = value < p.low ? all(p.low) : value > p.high ? all(p.high) : value;  // NaN stays
      store(first + i, value);
      value *= c.alpha;
      if (noisy) value += c.beta * load(z + i);
      store(second + i, value);
      store(z + i, value * c.input_scale);
    }
    write(layout, denoised, n, start, count, first);
    if (sample.data) write(layout, sample, n, start, count, second);
    if (model_input.data) write(layout, model_input, n, start, count, z);
  }
};

Source source(const StepTensor& t) { return {t.data, t.dtype, t.strides[0], {}, false}; }

}  // namespace

const char* consistency_step(const StepArguments& p) {
  if (p.dims < 2 || p.dims > MAX_DIMS) return "expected 2 to 16 dimensions";
  Step step{p, {}, source(p.x), source(p.model_output), source(p.noise), source(p.denoised), source(p.sample),
            source(p.model_input)};
  // The noise's own tensor, made where it is not given and is not made in place.
  StepTensor made;
  made.strides[p.dims - 1] = 1;
  for (int d = p.dims - 2; d >= 0; --d) made.strides[d] = made.strides[d + 1] * p.shape[d + 1];
  const StepTensor& noise = p.noise.data ? p.noise : made;
  Source* sources[] = {&step.x, &step.model_output, &step.noise, &step.denoised, &step.sample, &step.model_input};
  const StepTensor* tensors[] = {&p.x, &p.model_output, &noise, &p.denoised, &p.denoised, &p.denoised};
  step.layout = merge(p, sources, tensors, 6);
  step.sample.n = step.model_input.n = p.denoised.strides[0];
  int64_t samples = p.shape[0], size = step.layout.size;
  if (samples <= 0 || size <= 0) return "x has no elements";
  bool apart = p.seeded && !p.noise.data && !step.layout.natural;
  int64_t padded = (size + TILE - 1) / TILE * TILE, tiles = padded / TILE;
  float* apart_noise = nullptr;
  if (apart) {
    apart_noise = (float*)scratch(SCRATCH_ROWS, samples * padded * 4);
    if (!apart_noise) return "no memory for the noise";
    step.noise.data = apart_noise;
    step.noise.n = padded;
  }
  auto body = [&](Team team) {
    Share mine = share(samples * tiles, team);
    if (apart) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        int64_t n = i / tiles, start = i % tiles * TILE;
        normals(apart_noise + n * padded + start, start, TILE, p.draw, p.seed, p.first_sample + (uint32_t)n);
      }
      team.barrier();
    }
    for (int64_t i = mine.begin; i < mine.end; ++i) step.tile(i / tiles, i % tiles * TILE);
  };
  parallel(samples * size < 4 * TILE ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
