// The gradient of the consistency step, in one pass:
//
//     g       = dsample + input_scale · dinput
//     r       = ddenoised + alpha · g, and 0 where `denoised` was clipped
//     dx      = a · r    doutput = b · r    dnoise = beta · g
//
// A thread has tiles of a sample, in the order of dx in memory. Whether an element was clipped is computed again, from x
// and the model's output, as the forward does.
#include "../faults.h"
#include "../isa.h"
#include "../step_tiles.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

struct StepGradient {
  const StepBackwardArguments& p;
  Layout layout;
  Source ddenoised, dsample, dinput, x, model_output, dx, doutput, dnoise;

  void tile(int64_t n, int64_t start) const {
    alignas(64) float result[TILE], sample[TILE], input[TILE], first[TILE], second[TILE];
    int64_t count = layout.size - start < TILE ? layout.size - start : TILE;
    float a = coefficient(p.a, n), b = coefficient(p.b, n), alpha = coefficient(p.alpha, n);
    float beta = coefficient(p.beta, n), input_scale = coefficient(p.input_scale, n);
    if (ddenoised.data) read(layout, ddenoised, n, start, count, result);
    if (dsample.data) read(layout, dsample, n, start, count, sample);
    if (dinput.data) read(layout, dinput, n, start, count, input);
    if (p.clip) {
      read(layout, x, n, start, count, first);
      read(layout, model_output, n, start, count, second);
    }
    for (int64_t i = 0; i < count; i += LANES) {
      Floats g = dsample.data ? load(sample + i) : zeros(), r = ddenoised.data ? load(result + i) : zeros();
      if (dinput.data && !FAULT(gradient_of_input_missed)) g += input_scale * load(input + i);
      if (dsample.data || dinput.data) r += alpha * g;
      if (p.clip && !FAULT(clip_of_gradient_missed)) {
        Floats value = a * load(first + i) + b * load(second + i);
        r = value < p.low ? zeros() : value > p.high ? zeros() : value == value ? r : zeros();
      }
      store(first + i, a * r);
      store(second + i, b * r);
      if (dnoise.data) store(sample + i, beta * g);
    }
    write(layout, dx, n, start, count, first);
    write(layout, doutput, n, start, count, second);
    if (dnoise.data) write(layout, dnoise, n, start, count, sample);
  }
};

}  // namespace

const char* consistency_step_backward(const StepBackwardArguments& p) {
  if (p.dims < 2 || p.dims > MAX_DIMS) return "expected 2 to 16 dimensions";
  StepGradient step{p, {}, source(p.ddenoised), source(p.dsample), source(p.dinput), source(p.x),
                    source(p.model_output), source(p.dx), source(p.doutput), source(p.dnoise)};
  Source* sources[] = {&step.ddenoised, &step.dsample, &step.dinput, &step.x, &step.model_output, &step.dx,
                       &step.doutput, &step.dnoise};
  const StepTensor* tensors[] = {&p.ddenoised, &p.dsample, &p.dinput, &p.x, &p.model_output, &p.dx, &p.dx, &p.dx};
  // A gradient that is not given lies as dx does: it keeps no dimensions apart.
  for (int t = 0; t < 3; ++t)
    if (!tensors[t]->data) tensors[t] = &p.dx;
  step.layout = merge(p.dims, p.shape, p.dx, sources, tensors, 8);
  step.doutput.n = step.dnoise.n = p.dx.strides[0];
  int64_t samples = p.shape[0], size = step.layout.size, tiles = (size + TILE - 1) / TILE;
  if (samples <= 0 || size <= 0) return "x has no elements";
  auto body = [&](Team team) {
    Share mine = share(samples * tiles, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) step.tile(i / tiles, i % tiles * TILE);
  };
  parallel(samples * size < 8 * TILE ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
