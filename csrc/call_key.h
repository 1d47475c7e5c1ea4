// What a call of an operator is but for its tensors' elements and addresses: see kernels/remembered.py.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "torch_tensors.h"

namespace cmfast {

// Variables of the environment that say how a call is served.
constexpr const char* CALL_VARIABLES[] = {"CMFAST_BACKEND", "CMFAST_AUTOTUNE", "CMFAST_CACHE"};

// Of a call's arguments in order: bytes that say of each tensor its dtype, sizes, strides, how its address is aligned and
// which of the tensors before it has that address too, of all else its type, and what the environment says; a tuple of all
// that is no tensor; the tensors' addresses; and the type and number of their device, as DLPack has them. None where a
// tensor is a subclass's, has no elements, or is on another device than the first, where there is none, and where
// something else is no plain number, string, dtype or sequence.
inline py::object call_key(const py::sequence& arguments) {
  static const Describe describe = describer();
  static PyObject* const tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* const parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  if (!describe) return py::none();
  thread_local std::vector<int64_t> words;
  thread_local std::vector<void*> addresses;
  words.clear();
  addresses.clear();
  int32_t device_type = 0, device = 0;
  static PyObject* const dtype = py::object(py::module_::import("torch").attr("dtype")).release().ptr();
  const PyObject* const plain[] = {(PyObject*)Py_TYPE(Py_None), (PyObject*)&PyBool_Type, (PyObject*)&PyLong_Type,
                                   (PyObject*)&PyFloat_Type, (PyObject*)&PyUnicode_Type, (PyObject*)&PyTuple_Type,
                                   (PyObject*)&PyList_Type, dtype};
  const size_t count = py::len(arguments);
  std::vector<py::object> numbers;
  numbers.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    py::object given = arguments[i];
    PyTypeObject* type = Py_TYPE(given.ptr());
    if ((PyObject*)type != tensor && (PyObject*)type != parameter) {
      auto kind = std::find(std::begin(plain), std::end(plain), (PyObject*)type);
      if (kind == std::end(plain)) return py::none();
      const bool list = PyList_Check(given.ptr());
      words.push_back(list ? -6 : -1 - (kind - std::begin(plain)));  // a list is the tuple that it becomes
      numbers.push_back(list ? py::reinterpret_steal<py::object>(PyList_AsTuple(given.ptr()))
                                                  : std::move(given));
      continue;
    }
    dlpack::Tensor t;
    if (describe(given.ptr(), &t)) {
      PyErr_Clear();  // a tensor that DLPack cannot describe
      return py::none();
    }
    char* data = (char*)t.data + t.byte_offset;
    if (!t.data) return py::none();
    if (addresses.empty()) device_type = t.device_type, device = t.device_id;
    if (t.device_type != device_type || t.device_id != device) return py::none();
    int64_t same = 0;
    while (same < (int64_t)addresses.size() && addresses[same] != data) ++same;
    words.push_back(t.ndim | (int64_t)t.code << 8 | (int64_t)t.bits << 16 | (int64_t)t.lanes << 24 |
                    (int64_t)((uintptr_t)data % 16) << 40 | same << 48);
    words.insert(words.end(), t.shape, t.shape + t.ndim);
    words.insert(words.end(), t.strides, t.strides + t.ndim);
    addresses.push_back(data);
  }
  if (addresses.empty()) return py::none();
  thread_local std::string text;
  text.assign((const char*)words.data(), words.size() * sizeof(int64_t));
  for (const char* variable : CALL_VARIABLES) {
    const char* value = std::getenv(variable);
    text.append(value ? value : "").push_back('\0');
  }
  py::bytes key(text);
  py::tuple others(numbers.size()), at(addresses.size());
  for (size_t i = 0; i < numbers.size(); ++i) others[i] = std::move(numbers[i]);
  for (size_t i = 0; i < addresses.size(); ++i) at[i] = py::int_((uintptr_t)addresses[i]);
  return py::make_tuple(std::move(key), std::move(others), std::move(at), device_type, device);
}

}  // namespace cmfast
