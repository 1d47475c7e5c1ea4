// The Python module of the CUDA launchers: cmfast._cuda, and its emulation on the CPU where CMFAST_EMULATE is defined.
//
// Tensors come as addresses (0: none) with the codes of their dtypes and strides. Every launcher takes the stream and
// the device last (a negative device: CPU memory), and returns an empty string or what went wrong.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/consistency.h"
#include "cuda/device.h"
#ifdef CMFAST_EMULATE
#include "emulation/scheduler.h"
#endif

namespace py = pybind11;
using namespace cmfast;

namespace {

using Address = uintptr_t;
using Sizes = std::vector<int64_t>;

void* at(Address address) { return reinterpret_cast<void*>(address); }

template <class Launch>
std::string on(int device, Launch launch) {
  std::string error = set_device(device);
  return error.empty() ? launch() : error;
}

// ---- consistency step: a tensor is (address, dtype, strides), a vector of coefficients (address, stride)

using Tensor = std::tuple<Address, int, Sizes>;
using Vector = std::tuple<Address, int64_t>;

StepTensor step_tensor(const std::optional<Tensor>& t) {
  if (!t) return {};
  return {at(std::get<0>(*t)), std::get<1>(*t), std::get<2>(*t)};
}

Coefficients step_coefficients(const std::vector<std::optional<Vector>>& vectors, const std::vector<double>& scalars,
                               std::optional<double> low, std::optional<double> high) {
  if (vectors.size() != 5 || scalars.size() != 5) throw py::value_error("there are five coefficients");
  Coefficients c;
  Coefficient* each[] = {&c.a, &c.b, &c.alpha, &c.beta, &c.input_scale};
  for (int i = 0; i < 5; ++i) {
    each[i]->scalar = static_cast<float>(scalars[i]);
    if (!vectors[i]) continue;
    each[i]->vector = static_cast<const float*>(at(std::get<0>(*vectors[i])));
    each[i]->stride = std::get<1>(*vectors[i]);
  }
  c.clip = low && high;
  c.low = static_cast<float>(low.value_or(0));
  c.high = static_cast<float>(high.value_or(0));
  return c;
}

std::string bound_consistency_step(Sizes shape, Tensor x, Tensor model_output, std::optional<Tensor> noise,
                                   Tensor denoised, Address sample, Address model_input,
                                   std::vector<std::optional<Vector>> vectors, std::vector<double> scalars,
                                   std::optional<double> low, std::optional<double> high, std::optional<int64_t> seed,
                                   uint32_t draw, uint32_t first_sample, Address stream, int device) {
  StepArguments p;
  p.shape = std::move(shape);
  p.x = step_tensor(x);
  p.model_output = step_tensor(model_output);
  p.noise = step_tensor(noise);
  p.out = step_tensor(denoised);
  p.sample = at(sample);
  p.model_input = at(model_input);
  p.coefficients = step_coefficients(vectors, scalars, low, high);
  p.seed = {seed.has_value(), static_cast<uint64_t>(seed.value_or(0)), draw, first_sample};
  return on(device, [&] { return consistency_step(p, at(stream)); });
}

std::string bound_consistency_step_backward(Sizes shape, std::vector<std::optional<Tensor>> grads, Tensor x,
                                            Tensor model_output, Tensor dx, Address d_output, Address d_noise,
                                            int d_noise_dtype, std::vector<std::optional<Vector>> vectors,
                                            std::vector<double> scalars, std::optional<double> low,
                                            std::optional<double> high, Address stream, int device) {
  if (grads.size() != 3) throw py::value_error("there are three gradients");
  StepBackwardArguments p;
  p.shape = std::move(shape);
  p.d_denoised = step_tensor(grads[0]);
  p.d_sample = step_tensor(grads[1]);
  p.d_input = step_tensor(grads[2]);
  p.x = step_tensor(x);
  p.model_output = step_tensor(model_output);
  p.out = step_tensor(dx);
  p.d_output = at(d_output);
  p.d_noise = at(d_noise);
  p.d_noise_dtype = d_noise_dtype;
  p.coefficients = step_coefficients(vectors, scalars, low, high);
  return on(device, [&] { return consistency_step_backward(p, at(stream)); });
}

}  // namespace

PYBIND11_MODULE(CMFAST_MODULE, m) {
  m.def("build_info", [] {
    return py::dict(py::arg("architectures") = CMFAST_ARCHITECTURES, py::arg("compiler") = CMFAST_COMPILER);
  });
  m.def("nothing", [](Address, Address, int device) { return on(device, nothing); });
  m.def("consistency_step", bound_consistency_step);
  m.def("consistency_step_backward", bound_consistency_step_backward);
#ifdef CMFAST_EMULATE
  m.def("set_schedule", emulation::set_schedule);
  m.def("set_fault", emulation::set_fault);
#endif
}
