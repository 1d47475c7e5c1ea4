// The Python module of the CPU kernels: cmfast._cpu.
//
// Tensors come as addresses (0: none) with the codes of their dtypes and strides. Every launcher takes the number of
// threads last, runs without the interpreter's lock, and returns an empty string or what went wrong.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call_key.h"
#include "cpu/checksum.h"
#include "cpu/faults.h"
#include "cpu/isa.h"
#include "cpu/mapped_file.h"
#include "cpu/program.h"
#include "cpu_direct/attention.h"
#include "cpu_direct/channel_norm.h"
#include "cpu_direct/consistency.h"
#include "cpu_direct/conv.h"
#include "cpu_direct/group_norm.h"
#include "cpu_direct/moments.h"
#include "cpu_direct/timestep_embedding.h"
#include "cpu_snapshots.h"

namespace py = pybind11;
using namespace cmfast;

#ifdef CMFAST_FAULTS
int cmfast::fault = -1;
#endif

namespace {

using Address = uintptr_t;
using Sizes = std::vector<int64_t>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::string isas() {
  std::string names;
  for (int i = 0; i < KERNELS_COUNT; ++i)
    if (ALL_KERNELS[i].runs_here()) names += (names.empty() ? "" : ", ") + std::string(ALL_KERNELS[i].name);
  return names;
}

std::string unknown_isa(const std::string& name) {
  return "the CPU kernels have no instruction set '" + name + "' that runs here: choose one of " + isas();
}

// The program that takes this thread's calls of launchers instead of their running at once.
thread_local Program* recorded = nullptr;

template <class Arguments>
std::string run(const char* (*Kernels::*kernel)(const Arguments&), const Arguments& arguments) {
  if (recorded) {
    recorded->add(kernel, arguments);
    return "";
  }
  py::gil_scoped_release unlocked;
  const Kernels* found = kernels();
  if (!found) return unknown_isa(std::getenv("CMFAST_CPU_ISA"));
  const char* error = (found->*kernel)(arguments);
  return error ? error : "";
}

// Whether tensors may be read as they are: nothing is recorded, and nobody has chosen a backend.
bool reads_tensors() { return !recorded && serves_by_default(); }

// Run a kernel with what was read of torch's tensors; false where there is nothing, or the kernel does not take it: the
// operator is then to be called with what Python prepares.
template <class Arguments>
bool run_of(const char* (*Kernels::*kernel)(const Arguments&), const std::optional<Arguments>& arguments) {
  return arguments && run(kernel, *arguments).empty();
}

// ---- consistency step: a tensor is (address, dtype, strides), a vector of coefficients (address, stride)

using Tensor = std::tuple<Address, int, Sizes>;
using Vector = std::tuple<Address, int64_t>;

StepTensor step_tensor(const std::optional<Tensor>& t, size_t dims) {
  StepTensor tensor;
  if (!t) return tensor;
  const Sizes& strides = std::get<2>(*t);
  if (strides.size() != dims) throw py::value_error("a tensor has not the dimensions of x");
  tensor.data = at(std::get<0>(*t));
  tensor.dtype = std::get<1>(*t);
  std::copy(strides.begin(), strides.end(), tensor.strides);
  return tensor;
}

template <class Arguments>
void set_coefficients(Arguments& p, const std::vector<std::optional<Vector>>& vectors,
                      const std::vector<double>& scalars) {
  if (vectors.size() != 5 || scalars.size() != 5) throw py::value_error("there are five coefficients");
  Coefficient* each[] = {&p.a, &p.b, &p.alpha, &p.beta, &p.input_scale};
  for (int i = 0; i < 5; ++i) {
    each[i]->scalar = static_cast<float>(scalars[i]);
    if (!vectors[i]) continue;
    each[i]->vector = at<const float>(std::get<0>(*vectors[i]));
    each[i]->stride = std::get<1>(*vectors[i]);
  }
}

std::string bound_consistency_step(Sizes shape, Tensor x, Tensor model_output, std::optional<Tensor> noise,
                                   Tensor denoised, std::optional<Tensor> sample, std::optional<Tensor> model_input,
                                   std::vector<std::optional<Vector>> vectors, std::vector<double> scalars,
                                   std::optional<double> low, std::optional<double> high, std::optional<int64_t> seed,
                                   uint32_t draw, uint32_t first_sample, int threads) {
  if (shape.size() > MAX_DIMS) return "x has more than 16 dimensions";
  StepArguments p;
  p.dims = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), p.shape);
  p.x = step_tensor(x, shape.size());
  p.model_output = step_tensor(model_output, shape.size());
  p.noise = step_tensor(noise, shape.size());
  p.denoised = step_tensor(denoised, shape.size());
  p.sample = step_tensor(sample, shape.size());
  p.model_input = step_tensor(model_input, shape.size());
  set_coefficients(p, vectors, scalars);
  p.clip = low && high;
  p.low = static_cast<float>(low.value_or(0));
  p.high = static_cast<float>(high.value_or(0));
  p.seeded = seed.has_value();
  p.seed = static_cast<uint64_t>(seed.value_or(0));
  p.draw = draw;
  p.first_sample = first_sample;
  p.threads = threads;
  return run(&Kernels::consistency_step, p);
}

// Of torch's tensors (None: none) and floats, the outputs empty ones; false where it has to be called with what Python
// prepares.
bool bound_consistency_step_of(py::handle x, py::handle model_output, py::handle noise, py::handle denoised,
                               py::handle sample, py::handle model_input, py::handle a, py::handle b, py::handle alpha,
                               py::handle beta, py::handle input_scale, std::optional<double> low,
                               std::optional<double> high, std::optional<uint64_t> seed, uint32_t draw,
                               uint32_t first_sample, int threads) {
  bool noisy = !noise.is_none() || seed, rescaled = !input_scale.is_none();
  if (!reads_tensors() || (!noise.is_none() && seed) || noisy == beta.is_none() || (rescaled && sample.is_none()))
    return false;
  std::optional<StepArguments> p = step_arguments({x, model_output, noise, denoised, sample, model_input},
                                                  {a, b, alpha, beta, input_scale});
  if (!p) return false;
  p->clip = low && high;
  p->low = static_cast<float>(low.value_or(0));
  p->high = static_cast<float>(high.value_or(0));
  if (first_sample > (uint64_t{1} << 32) - p->shape[0]) return false;
  p->seeded = seed.has_value();
  p->seed = seed.value_or(0);
  p->draw = draw;
  p->first_sample = first_sample;
  p->threads = threads;
  return run_of(&Kernels::consistency_step, p);
}

std::string bound_consistency_step_backward(Sizes shape, std::vector<std::optional<Tensor>> grads, Tensor x,
                                            Tensor model_output, Tensor dx, Tensor doutput,
                                            std::optional<Tensor> dnoise, std::vector<std::optional<Vector>> vectors,
                                            std::vector<double> scalars, std::optional<double> low,
                                            std::optional<double> high, int threads) {
  if (shape.size() > MAX_DIMS) return "x has more than 16 dimensions";
  if (grads.size() != 3) throw py::value_error("there are three gradients: of denoised, sample and model_input");
  StepBackwardArguments p;
  p.dims = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), p.shape);
  p.ddenoised = step_tensor(grads[0], shape.size());
  p.dsample = step_tensor(grads[1], shape.size());
  p.dinput = step_tensor(grads[2], shape.size());
  p.x = step_tensor(x, shape.size());
  p.model_output = step_tensor(model_output, shape.size());
  p.dx = step_tensor(dx, shape.size());
  p.doutput = step_tensor(doutput, shape.size());
  p.dnoise = step_tensor(dnoise, shape.size());
  set_coefficients(p, vectors, scalars);
  p.clip = low && high;
  p.low = static_cast<float>(low.value_or(0));
  p.high = static_cast<float>(high.value_or(0));
  p.threads = threads;
  return run(&Kernels::consistency_step_backward, p);
}

// ---- group norm: a tensor is (address, channels, strides of N, C and the positions), a row (address, stride of N)

using Planes = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;

NormTensor norm_tensor(const std::optional<Planes>& t) {
  if (!t) return {};
  auto [data, channels, n, c, p] = *t;
  return {at(data), channels, n, c, p};
}

NormRow norm_row(const std::optional<Vector>& row) {
  if (!row) return {};
  return {at<const float>(std::get<0>(*row)), std::get<1>(*row)};
}

template <class Arguments>
void set_rows(Arguments& p, const std::vector<std::optional<Vector>>& rows) {
  if (rows.size() != 5) throw py::value_error("there are five rows: weight, bias, add, scale, shift");
  NormRow* each[] = {&p.weight, &p.bias, &p.add, &p.scale, &p.shift};
  for (int i = 0; i < 5; ++i) *each[i] = norm_row(rows[i]);
}

using Channels = std::tuple<Address, int64_t>;

ChannelMoments channel_moments(const std::optional<Channels>& m) {
  if (!m) return {};
  return {at<const float>(std::get<0>(*m)), std::get<1>(*m)};
}

NormArguments norm_of_planes(int64_t samples, int64_t positions, int64_t groups, int dtype, Planes h,
                             std::optional<Planes> skip, Planes y, const std::vector<std::optional<Vector>>& rows,
                             float eps, bool silu, int threads) {
  NormArguments p;
  p.samples = samples;
  p.positions = positions;
  p.groups = groups;
  p.dtype = dtype;
  p.h = norm_tensor(h);
  p.skip = norm_tensor(skip);
  p.y = norm_tensor(y);
  set_rows(p, rows);
  p.eps = eps;
  p.silu = silu;
  p.threads = threads;
  return p;
}

std::string bound_group_norm(int64_t samples, int64_t positions, int64_t groups, int dtype, Planes h,
                             std::optional<Planes> skip, Planes y, std::vector<std::optional<Vector>> rows, float eps,
                             bool silu, Address mean, Address rstd, int threads) {
  NormArguments p = norm_of_planes(samples, positions, groups, dtype, h, skip, y, rows, eps, silu, threads);
  p.mean = at<float>(mean);
  p.rstd = at<float>(rstd);
  return run(&Kernels::group_norm, p);
}

std::optional<NormArguments> with(std::optional<NormArguments> p, float eps, bool silu, int threads) {
  if (p) p->eps = eps, p->silu = silu, p->threads = threads;
  return p;
}

// Of torch's tensors, y an empty one; false where it has to be called with what Python prepares.
bool bound_group_norm_of(py::handle y, py::handle h, py::handle skip, int64_t groups, py::handle weight,
                         py::handle bias, py::handle add, py::handle scale, py::handle shift, float eps, bool silu,
                         int threads) {
  if (!reads_tensors()) return false;
  std::optional<NormArguments> p = norm_arguments(y, h, skip, groups, {weight, bias, add, scale, shift});
  return run_of(&Kernels::group_norm, with(p, eps, silu, threads));
}

// The same with the moments of h and of skip, of each (address, channels).
std::string bound_apply_group_norm(int64_t samples, int64_t positions, int64_t groups, int dtype, Planes h,
                                   std::optional<Planes> skip, Planes y, std::vector<std::optional<Vector>> rows,
                                   float eps, bool silu, Channels moments, std::optional<Channels> skip_moments,
                                   int threads) {
  NormArguments p = norm_of_planes(samples, positions, groups, dtype, h, skip, y, rows, eps, silu, threads);
  p.moments = channel_moments(moments);
  p.skip_moments = channel_moments(skip_moments);
  return run(&Kernels::group_norm, p);
}

bool bound_apply_group_norm_of(py::handle y, py::handle h, py::handle skip, py::handle first, py::handle second,
                               int64_t groups, py::handle weight, py::handle bias, py::handle add, py::handle scale,
                               py::handle shift, float eps, bool silu, int threads) {
  if (!reads_tensors()) return false;
  std::optional<NormArguments> p =
      apply_arguments(y, h, skip, first, second, groups, {weight, bias, add, scale, shift});
  return run_of(&Kernels::group_norm, with(p, eps, silu, threads));
}

std::string bound_group_norm_backward(int64_t samples, int64_t positions, int64_t groups, int dtype, Planes grad,
                                      Planes h, std::optional<Planes> skip, Planes dx,
                                      std::vector<std::optional<Vector>> rows, bool silu, Address mean, Address rstd,
                                      Address dz_sum, Address dzu_sum, int threads) {
  NormBackwardArguments p;
  p.samples = samples;
  p.positions = positions;
  p.groups = groups;
  p.dtype = dtype;
  p.grad = norm_tensor(grad);
  p.h = norm_tensor(h);
  p.skip = norm_tensor(skip);
  p.dx = norm_tensor(dx);
  set_rows(p, rows);
  p.silu = silu;
  p.mean = at<const float>(mean);
  p.rstd = at<const float>(rstd);
  p.dz_sum = at<float>(dz_sum);
  p.dzu_sum = at<float>(dzu_sum);
  p.threads = threads;
  return run(&Kernels::group_norm_backward, p);
}

// ---- attention: a tensor is (address, strides of N, H, T and D)

using HeadsTensor = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;

AttentionTensor attention_tensor(const HeadsTensor& t) {
  auto [data, n, h, t_, d] = t;
  return {at(data), n, h, t_, d};
}

using HeadsSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

std::string bound_attention(HeadsSizes sizes, int dtype, bool pairs, HeadsTensor q, HeadsTensor k, HeadsTensor v,
                            HeadsTensor out, Address lse, float scale, int threads) {
  AttentionArguments p;
  std::tie(p.samples, p.heads, p.queries, p.keys, p.head_size) = sizes;
  p.dtype = dtype;
  p.pairs = pairs;
  p.q = attention_tensor(q);
  p.k = attention_tensor(k);
  p.v = attention_tensor(v);
  p.out = attention_tensor(out);
  p.lse = at<float>(lse);
  p.scale = scale;
  p.threads = threads;
  return run(&Kernels::attention, p);
}

// Of torch's tensors, out an empty one; false where it has to be called with what Python prepares.
bool bound_attention_of(py::handle out, py::handle q, py::handle k, py::handle v, float scale, int threads) {
  if (!reads_tensors()) return false;
  std::optional<AttentionArguments> p = attention_arguments(out, q, k, v);
  if (!p) return false;
  thread_local std::vector<float> lse;
  lse.resize(p->samples * p->heads * p->queries);
  p->lse = lse.data();
  p->scale = scale;
  p->threads = threads;
  return run_of(&Kernels::attention, p);
}

std::string bound_attention_backward(HeadsSizes sizes, int dtype, HeadsTensor grad, HeadsTensor q, HeadsTensor k,
                                     HeadsTensor v, HeadsTensor out, HeadsTensor dq, HeadsTensor dk, HeadsTensor dv,
                                     Address lse, float scale, int threads) {
  AttentionBackwardArguments p;
  std::tie(p.samples, p.heads, p.queries, p.keys, p.head_size) = sizes;
  p.dtype = dtype;
  p.grad = attention_tensor(grad);
  p.q = attention_tensor(q);
  p.k = attention_tensor(k);
  p.v = attention_tensor(v);
  p.out = attention_tensor(out);
  p.dq = attention_tensor(dq);
  p.dk = attention_tensor(dk);
  p.dv = attention_tensor(dv);
  p.lse = at<const float>(lse);
  p.scale = scale;
  p.threads = threads;
  return run(&Kernels::attention_backward, p);
}

// ---- convolution: sizes are those of Z, Y, X, a shape is (Cin, Cout, sizes of the kernel, tile, whether transformed,
// whether bfloat16), a tensor (address, channels, strides of N, Z, Y, X)

template <class T>
using Three = std::tuple<T, T, T>;
using Shape = std::tuple<int64_t, int64_t, Three<int>, int, bool, bool>;
using Image = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t>;

ConvShape conv_shape(const Shape& shape, bool tiles) {
  auto [in_channels, out_channels, kernel, tile, transformed, pairs] = shape;
  auto [depth, height, width] = kernel;
  return {in_channels, out_channels, depth, height, width, tile, transformed, pairs, tiles};
}

bool tiles_here() {
  const Kernels* found = kernels();
  return found && found->tiles;
}

ConvTensor conv_tensor(const std::optional<Image>& t) {
  if (!t) return {};
  auto [data, channels, n, z, y, x] = *t;
  return {at(data), channels, n, z, y, x};
}

std::string bound_pack(Shape shape, Address weight, Address packed, int threads) {
  uint32_t* header = at<uint32_t>(packed);
  for (int64_t i = 0; i < HEADER_WORDS; ++i) header[i] = i ? 0 : tiles_here() ? TILED_HEADER : PLAIN_HEADER;
  return run(&Kernels::pack, {conv_shape(shape, tiles_here()), at<const float>(weight), header + HEADER_WORDS, threads});
}

std::string bound_conv2d(Shape shape, int64_t samples, Three<int64_t> in_sizes, Three<int64_t> out_sizes,
                         Three<int> stride, Three<int> padding, int resample, int dtype, Image h,
                         std::optional<Image> skip, std::optional<Image> residual, int residual_resample, Image out,
                         Address gain, Address offset, bool silu, int gate, bool relu, Address weights,
                         Address bias, Address moments, int threads) {
  ConvArguments p;
  p.shape = conv_shape(shape, false);
  if (!read_weights(at<const uint32_t>(weights), &p)) return "the packed weights are not what `pack` wrote";
  p.samples = samples;
  std::tie(p.depth, p.height, p.width) = in_sizes;
  std::tie(p.out_depth, p.out_height, p.out_width) = out_sizes;
  std::tie(p.stride_z, p.stride_y, p.stride_x) = stride;
  std::tie(p.front, p.top, p.left) = padding;
  p.resample = resample;
  p.dtype = dtype;
  p.h = conv_tensor(h);
  p.skip = conv_tensor(skip);
  p.residual = conv_tensor(residual);
  p.residual_resample = residual_resample;
  p.out = conv_tensor(out);
  p.gain = at<const float>(gain);
  p.offset = at<const float>(offset);
  p.silu = silu;
  p.gate = gate;
  p.relu = relu;
  p.bias = at<const float>(bias);
  p.moments = at<float>(moments);
  p.threads = threads;
  return run(&Kernels::conv2d, p);
}

// Of torch's tensors (None: none), out and moments empty ones; false where it has to be called with what Python prepares.
bool bound_conv2d_of(py::handle out, py::handle moments, py::handle h, py::handle skip, py::handle residual,
                     py::handle gain, py::handle offset, bool silu, bool relu, int resample, int gate,
                     int residual_resample, py::handle weight, py::handle bias, py::handle packed, int tile,
                     bool transformed, py::tuple stride, py::tuple padding, bool pairs, int threads) {
  if (!reads_tensors()) return false;
  ConvOptions options{tile, transformed, pairs, std::move(stride), std::move(padding), resample, gate,
                      residual_resample, silu, relu};
  std::optional<ConvArguments> p =
      conv_arguments({out, moments, h, skip, weight, bias, packed, gain, offset, residual}, options);
  if (p) p->threads = threads;
  return run_of(&Kernels::conv2d, p);
}

// ---- moments of channels: [N, 2, C] of a tensor is (address, channels)

std::string bound_moments(int64_t samples, int64_t positions, int dtype, Planes x, Address moments, int threads) {
  return run(&Kernels::moments, {samples, positions, dtype, norm_tensor(x), at<float>(moments), threads});
}

// Of torch's tensors, moments an empty one; false where it has to be called with what Python prepares.
bool bound_moments_of(py::handle moments, py::handle x, int threads) {
  if (!reads_tensors()) return false;
  std::optional<MomentsArguments> p = moments_arguments(moments, x);
  if (p) p->threads = threads;
  return run_of(&Kernels::moments, p);
}

std::string bound_fold_group_norm(int64_t samples, int64_t positions, int64_t groups, Channels h,
                                  std::optional<Channels> skip, std::vector<std::optional<Vector>> rows, float eps,
                                  Address gain, Address offset, int) {
  FoldArguments p;
  p.samples = samples;
  p.positions = positions;
  p.groups = groups;
  p.h = channel_moments(h);
  p.skip = channel_moments(skip);
  set_rows(p, rows);
  p.eps = eps;
  p.gain = at<float>(gain);
  p.offset = at<float>(offset);
  return run(&Kernels::fold_group_norm, p);
}

// Of torch's tensors, gain and offset empty ones; false where it has to be called with what Python prepares.
bool bound_fold_group_norm_of(py::handle gain, py::handle offset, py::handle first, py::handle second, int64_t size,
                              int64_t groups, py::handle weight, py::handle bias, py::handle add, py::handle scale,
                              py::handle shift, float eps, int) {
  if (!reads_tensors()) return false;
  std::optional<FoldArguments> p =
      fold_arguments(gain, offset, first, second, size, groups, {weight, bias, add, scale, shift});
  if (p) p->eps = eps;
  return run_of(&Kernels::fold_group_norm, p);
}

std::string bound_channel_norm(int64_t samples, int64_t positions, int dtype, Planes x, Planes y,
                               std::vector<std::optional<Vector>> rows, float eps, bool centred, float least,
                               bool silu, int threads) {
  if (rows.size() != 4) throw py::value_error("there are four rows: weight, bias, scale, shift");
  ChannelNormArguments p;
  p.samples = samples;
  p.positions = positions;
  p.dtype = dtype;
  p.x = norm_tensor(x);
  p.y = norm_tensor(y);
  NormRow* each[] = {&p.weight, &p.bias, &p.scale, &p.shift};
  for (int i = 0; i < 4; ++i) *each[i] = norm_row(rows[i]);
  p.eps = eps;
  p.least = least;
  p.centred = centred;
  p.silu = silu;
  p.threads = threads;
  return run(&Kernels::channel_norm, p);
}

// Of torch's tensors, y an empty one; false where it has to be called with what Python prepares.
bool bound_channel_norm_of(py::handle y, py::handle x, py::handle weight, py::handle bias, double eps, bool centred,
                           double least, py::handle scale, py::handle shift, bool silu, int threads) {
  if (!reads_tensors() || eps < 0 || least < 0) return false;
  std::optional<ChannelNormArguments> p = channel_norm_arguments(y, x, {weight, bias, scale, shift});
  if (!p) return false;
  p->eps = (float)eps;
  p->least = (float)least;
  p->centred = centred;
  p->silu = silu;
  p->threads = threads;
  return run_of(&Kernels::channel_norm, p);
}

// ---- sinusoids of timesteps

std::string bound_timestep_embedding(int64_t samples, int64_t count, Vector t, Address frequencies, float scale,
                                     bool sin_first, Address y, int threads) {
  auto [from, stride] = t;
  return run(&Kernels::timestep_embedding, {samples, count, at<const float>(from), stride, at<const float>(frequencies),
                                            scale, sin_first, at<float>(y), threads});
}

// Of torch's tensors, y an empty one; false where it has to be called with what Python prepares.
bool bound_timestep_embedding_of(py::handle y, py::handle t, py::handle frequencies, float scale, bool sin_first,
                                 int threads) {
  if (!reads_tensors()) return false;
  std::optional<TimestepArguments> p = timestep_arguments(y, t, frequencies);
  if (!p) return false;
  p->scale = scale;
  p->sin_first = sin_first;
  p->threads = threads;
  return run_of(&Kernels::timestep_embedding, p);
}

// ---- programs

std::string run_program(const Program& program, int threads, std::vector<double>* seconds = nullptr) {
  const Kernels* found = kernels();
  if (!found) return unknown_isa(std::getenv("CMFAST_CPU_ISA"));
  py::gil_scoped_release unlocked;
  const char* error = program.run(*found, threads, seconds);
  return error ? error : "";
}

}  // namespace

PYBIND11_MODULE(CMFAST_MODULE, m) {
  py::class_<Program>(m, "Program", py::module_local())  // of several builds in one process, each its own
      .def(py::init<>())
      .def("__len__", &Program::size)
      .def("record", [](Program& program, bool on) { recorded = on ? &program : nullptr; })
      .def("run", [](const Program& program, int threads) { return run_program(program, threads); })
      .def("time", [](const Program& program, int threads) {
        std::vector<double> seconds;
        std::string error = run_program(program, threads, &seconds);
        return std::make_tuple(error, seconds);
      });
  m.def("checksum", [](Address data, int64_t bytes, int threads) {
    py::gil_scoped_release unlocked;
    return checksum(at(data), bytes, threads);
  });
  py::class_<MappedFile>(m, "MappedFile", py::buffer_protocol(), py::module_local())
      .def(py::init([](const std::string& path, int64_t bytes) {
        auto file = std::make_unique<MappedFile>(path, bytes);
        if (!file->error()) return file;
        errno = file->error();
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
        throw py::error_already_set();
      }))
      .def_buffer([](MappedFile& file) { return py::buffer_info((uint8_t*)file.data(), file.bytes()); })
      .def_property_readonly("moved", &MappedFile::moved)
      .def_property_readonly("settled", &MappedFile::settled);
  py::class_<Snapshot>(m, "Snapshot", py::module_local())
      .def(py::init<const std::vector<py::dict>&, const std::vector<py::object>&>())
      .def("first_difference", &Snapshot::first_difference)
      .def("accept", &Snapshot::accept);
  py::class_<TensorSnapshot>(m, "TensorSnapshot", py::module_local())
      .def(py::init<const Tensors&, const Parts&, bool>(), py::arg("tensors"), py::arg("parts"),
           py::arg("by_methods") = false);
  m.def("look", look);
  m.def("build_info", [] {
    const Kernels* found = kernels();
    return py::dict(py::arg("isa") = found ? found->name : "none", py::arg("isas") = isas(),
                    py::arg("layout") = found ? found->layout : "none", py::arg("tiles") = found && found->tiles,
                    py::arg("compiler") = CMFAST_COMPILER);
  });
  m.def("set_isa", [](const std::string& name) { return set_isa(name.c_str()) ? std::string() : unknown_isa(name); });
  m.def("usable", [] { return kernels() ? std::string() : unknown_isa(std::getenv("CMFAST_CPU_ISA")); });
  m.def("serves_by_default", serves_by_default);
  m.def("call_key", call_key);
  m.def("consistency_step", bound_consistency_step);
  m.def("consistency_step_backward", bound_consistency_step_backward);
  m.def("group_norm", bound_group_norm);
  m.def("group_norm_of", bound_group_norm_of);
  m.def("attention_of", bound_attention_of);
  m.def("consistency_step_of", bound_consistency_step_of);
  m.def("apply_group_norm_of", bound_apply_group_norm_of);
  m.def("conv2d_of", bound_conv2d_of);
  m.def("moments_of", bound_moments_of);
  m.def("fold_group_norm_of", bound_fold_group_norm_of);
  m.def("channel_norm_of", bound_channel_norm_of);
  m.def("timestep_embedding_of", bound_timestep_embedding_of);
  m.def("group_norm_backward", bound_group_norm_backward);
  m.def("attention", bound_attention);
  m.def("attention_backward", bound_attention_backward);
  m.def("packed_words", [](Shape shape) { return HEADER_WORDS + conv_shape(shape, tiles_here()).packed_words(); });
  m.def("pack", bound_pack);
  m.def("conv2d", bound_conv2d);
  m.def("moments", bound_moments);
  m.def("fold_group_norm", bound_fold_group_norm);
  m.def("channel_norm", bound_channel_norm);
  m.def("apply_group_norm", bound_apply_group_norm);
  m.def("timestep_embedding", bound_timestep_embedding);
#ifdef CMFAST_FAULTS
#define CMFAST_FAULT_STRING(name) #name,
  static const char* const names[] = {CMFAST_FAULT_NAMES(CMFAST_FAULT_STRING)};
  m.attr("FAULTS") = std::vector<std::string>(names, names + FAULTS_COUNT);
  m.def("set_fault", [](int number) { fault = number; });
#endif
}
