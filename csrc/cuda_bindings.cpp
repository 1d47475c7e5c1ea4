// The Python module of the CUDA launchers: cmfast._cuda, and its emulation on the CPU where CMFAST_EMULATE is defined.
//
// Tensors come as addresses (0: none) with the codes of their dtypes and strides. Every launcher takes the stream and
// the device last (a negative device: CPU memory), and returns an empty string or what went wrong.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/attention.h"
#include "cuda/consistency.h"
#include "cuda/conv.h"
#include "cuda/device.h"
#include "cuda/group_norm.h"
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

// ---- attention: a tensor is (address, strides), sizes are dtype, N, H, T, S, D

using HeadsTensor = std::tuple<Address, std::array<int64_t, 4>>;

AttentionTensor attention_tensor(const HeadsTensor& t) {
  const auto& [address, s] = t;
  return {at(address), {s[0], s[1], s[2], s[3]}};
}

AttentionSizes attention_sizes(const std::array<int64_t, 6>& s, double scale) {
  return {static_cast<int>(s[0]), s[1], s[2], s[3], s[4], s[5], static_cast<float>(scale)};
}

std::string bound_attention(std::array<int64_t, 6> sizes, double scale, HeadsTensor q, HeadsTensor k, HeadsTensor v,
                            HeadsTensor out, Address lse, Address stream, int device) {
  return on(device, [&] {
    return attention_forward(attention_sizes(sizes, scale), attention_tensor(q), attention_tensor(k),
                             attention_tensor(v), attention_tensor(out), static_cast<float*>(at(lse)), at(stream));
  });
}

std::string bound_attention_backward(std::array<int64_t, 6> sizes, double scale, HeadsTensor grad, HeadsTensor q,
                                     HeadsTensor k, HeadsTensor v, HeadsTensor out, Address lse, Address delta,
                                     HeadsTensor dq, HeadsTensor dk, HeadsTensor dv, Address stream, int device) {
  return on(device, [&] {
    return attention_backward(attention_sizes(sizes, scale), attention_tensor(grad), attention_tensor(q),
                              attention_tensor(k), attention_tensor(v), attention_tensor(out),
                              static_cast<const float*>(at(lse)), static_cast<float*>(at(delta)),
                              attention_tensor(dq), attention_tensor(dk), attention_tensor(dv), at(stream));
  });
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
                                   Address seed_at, uint32_t draw, uint32_t first_sample, Address first_sample_at,
                                   Address stream, int device) {
  StepArguments p;
  p.shape = std::move(shape);
  p.x = step_tensor(x);
  p.model_output = step_tensor(model_output);
  p.noise = step_tensor(noise);
  p.out = step_tensor(denoised);
  p.sample = at(sample);
  p.model_input = at(model_input);
  p.coefficients = step_coefficients(vectors, scalars, low, high);
  p.seed = {seed.has_value(), static_cast<uint64_t>(seed.value_or(0)), draw, first_sample,
            static_cast<const int64_t*>(at(seed_at)), static_cast<const int64_t*>(at(first_sample_at))};
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

// ---- convolution: an image is (address, strides of N, H and W), a row (address, stride of N)

using Image = std::tuple<Address, int64_t, int64_t, int64_t>;

ConvImage conv_image(const Image& t) { return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

ConvRows conv_rows(const Vector& t) { return {static_cast<const float*>(at(std::get<0>(t))), std::get<1>(t)}; }

// h, skip, residual and out; gain and offset; samples, height, width, channels of h, of skip and of the output; dtype,
// up, silu, relu, residual_resample; tile_width, segment
std::string bound_conv2d(const std::array<Image, 4>& images, const std::array<Vector, 2>& rows, Address weight,
                         Address bias, Address moments, Address workspace, const std::array<int64_t, 6>& sizes,
                         const std::array<int, 5>& forms, const std::array<int, 2>& division, Address stream,
                         int device) {
  ConvProblem p;
  p.h = conv_image(images[0]);
  p.skip = conv_image(images[1]);
  p.residual = conv_image(images[2]);
  p.out = conv_image(images[3]);
  p.gain = conv_rows(rows[0]);
  p.offset = conv_rows(rows[1]);
  p.weight = at(weight);
  p.bias = static_cast<const float*>(at(bias));
  p.moments = static_cast<float*>(at(moments));
  p.workspace = static_cast<float*>(at(workspace));
  p.samples = sizes[0];
  p.height = sizes[1];
  p.width = sizes[2];
  p.channels = sizes[3];
  p.skip_channels = sizes[4];
  p.columns = sizes[5];
  p.dtype = forms[0];
  p.up = forms[1];
  p.silu = forms[2];
  p.relu = forms[3];
  p.residual_resample = forms[4];
  p.tile_width = division[0];
  p.segment = division[1];
  return on(device, [&] { return conv2d(p, at(stream)); });
}

// ---- group norm: a tensor [N, C, P] is (address, strides of N, C and P), a parameter (address, dtype, stride of N)

using Strides = std::tuple<Address, int64_t, int64_t, int64_t>;
using Row = std::tuple<Address, int, int64_t>;
// h, skip; weight, bias, add, scale, shift; samples, positions, channels, those of h, groups; dtype, eps, silu
using Norm = std::tuple<Strides, std::optional<Strides>, std::vector<std::optional<Row>>, Sizes, int, double, bool>;

Strided strided(const Strides& t) { return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

GroupNormProblem norm_problem(const Norm& norm) {
  const auto& [h, skip, rows, sizes, dtype, eps, silu] = norm;
  if (rows.size() != 5 || sizes.size() != 5) throw py::value_error("there are five parameters and five sizes");
  GroupNormProblem p;
  p.h = strided(h);
  if (skip) p.skip = strided(*skip);
  Rows* each[] = {&p.weight, &p.bias, &p.add, &p.scale, &p.shift};
  for (int i = 0; i < 5; ++i)
    if (rows[i]) *each[i] = {at(std::get<0>(*rows[i])), std::get<2>(*rows[i]), std::get<1>(*rows[i])};
  p.samples = sizes[0];
  p.positions = sizes[1];
  p.channels = sizes[2];
  p.first_channels = sizes[3];
  p.num_groups = sizes[4];
  p.dtype = dtype;
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  return p;
}

float* floats(Address address) { return static_cast<float*>(at(address)); }

int64_t bound_group_norm_workspace(const Norm& norm, const Strides& y, int capability) {
  return group_norm_workspace(norm_problem(norm), {strided(y), nullptr, nullptr}, capability);
}

std::string bound_group_norm(const Norm& norm, const Strides& y, Address mean, Address rstd, Address workspace,
                             int64_t workspace_floats, int capability, Address stream, int device) {
  return on(device, [&] {
    return group_norm(norm_problem(norm), {strided(y), floats(mean), floats(rstd)},
                      {floats(workspace), workspace_floats}, capability, at(stream));
  });
}

int64_t bound_group_norm_backward_workspace(const Norm& norm, const Strides& dy, const Strides& dx) {
  GroupNormGradient gradient;
  gradient.dy = strided(dy);
  gradient.dx = strided(dx);
  return group_norm_backward_workspace(norm_problem(norm), gradient);
}

std::string bound_group_norm_backward(const Norm& norm, const Strides& dy, const Strides& dx, Address mean, Address rstd,
                                      Address dz_sum, Address dzu_sum, Address workspace, int64_t workspace_floats,
                                      Address stream, int device) {
  GroupNormGradient gradient;
  gradient.dy = strided(dy);
  gradient.dx = strided(dx);
  gradient.mean = floats(mean);
  gradient.rstd = floats(rstd);
  gradient.dz_sum = floats(dz_sum);
  gradient.dzu_sum = floats(dzu_sum);
  return on(device, [&] {
    return group_norm_backward(norm_problem(norm), gradient, {floats(workspace), workspace_floats}, at(stream));
  });
}

}  // namespace

PYBIND11_MODULE(CMFAST_MODULE, m) {
  m.def("build_info", [] {
    return py::dict(py::arg("architectures") = CMFAST_ARCHITECTURES, py::arg("compiler") = CMFAST_COMPILER);
  });
  m.def("planned", [](const py::function& call) {
    py::list launches;
    for (const PlannedLaunch& p : planned([&] { call(); })) {
      py::tuple grid = py::make_tuple(p.grid[0], p.grid[1], p.grid[2]);
      int threads = static_cast<int>(p.block[0] * p.block[1] * p.block[2]);
      launches.append(py::make_tuple(p.kernel, grid, threads, p.shared_bytes, p.cluster_x));
    }
    return launches;
  });
  m.def("launchable", [](int device) { return on(device, launchable); });
  m.def("nothing", [](Address, int device) { return on(device, nothing); });
  m.def("attention", bound_attention);
  m.def("attention_backward", bound_attention_backward);
  m.def("consistency_step", bound_consistency_step);
  m.def("consistency_step_backward", bound_consistency_step_backward);
  m.def("conv2d", bound_conv2d);
  m.def("group_norm_workspace", bound_group_norm_workspace);
  m.def("group_norm", bound_group_norm);
  m.def("group_norm_backward_workspace", bound_group_norm_backward_workspace);
  m.def("group_norm_backward", bound_group_norm_backward);
#ifdef CMFAST_EMULATE
  m.def("set_schedule", emulation::set_schedule);
  m.def("set_fault", emulation::set_fault);
#endif
}
