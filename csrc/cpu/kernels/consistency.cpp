// The consistency step, in one pass over the sample:
//
//     denoised    = clip(a · x + b · model_output)
//     sample      = alpha · denoised + beta · z
//     model_input = input_scale · sample
//
// A thread has tiles of a sample, in the order of `denoised` in memory. The noise of elements 4k to 4k + 3 in
// [C, *spatial] order comes from one Philox block: where `denoised` lies in that order, a tile's noise is made where it is
// used. Elsewhere, as in channels-last samples, it is made first, into a tensor of its own.
#include "../isa.h"
#include "../philox.h"
#include "../scratch.h"
#include "../step_tiles.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

struct Loaded {
  float a, b, alpha, beta, input_scale;
};

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
  step.layout = merge(p.dims, p.shape, p.denoised, sources, tensors, 6);
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
