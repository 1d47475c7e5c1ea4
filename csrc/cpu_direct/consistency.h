// The consistency step of torch's tensors as they are: see kernels/direct.
#pragma once

#include <array>

#include "../cpu/consistency.h"
#include "tensors.h"

namespace cmfast {

// A number, or a float32 tensor [N]. None is none.
inline bool read_coefficient(py::handle given, int64_t samples, Coefficient* into) {
  if (given.is_none()) return true;
  if (PyFloat_Check(given.ptr()) || PyLong_Check(given.ptr())) {
    into->scalar = (float)PyFloat_AsDouble(given.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();  // an integer beyond all floats
    return false;
  }
  std::optional<dlpack::Tensor> t = described(given);
  if (!t || t->ndim != 1 || t->shape[0] != samples || dtype_code(*t) != FLOAT32) return false;
  into->vector = (const float*)t->data;
  into->stride = t->strides[0];
  return true;
}

// The arguments of the kernel without its range and its noise's seed; none where the tensors are not as it takes them.
// `tensors` are x, model_output, noise, denoised, sample and model_input, of which those that are not given are None;
// `coefficients` are a, b, alpha, beta and input_scale.
inline std::optional<StepArguments> step_arguments(const std::array<py::handle, 6>& tensors,
                                                   const std::array<py::handle, 5>& coefficients) {
  StepArguments p;
  StepTensor* into[] = {&p.x, &p.model_output, &p.noise, &p.denoised, &p.sample, &p.model_input};
  std::optional<dlpack::Tensor> first;
  for (int i = 0; i < 6; ++i) {
    bool optional = i == 2 || i > 3;
    if (optional && tensors[i].is_none()) continue;
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
