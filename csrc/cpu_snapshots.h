// What a network was, to be asked at every call of it whether it still is: written for the time that takes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/checksum.h"

namespace cmfast {

namespace py = pybind11;

// Which objects some dicts hold, and in which order; they and the dicts are kept alive by who asks.
class Snapshot {
 public:
  explicit Snapshot(const std::vector<py::dict>& dicts) {
    for (const py::dict& dict : dicts) {
      dicts_.push_back(dict.ptr());
      sizes_.push_back(PyDict_Size(dict.ptr()));
      Py_ssize_t at = 0;
      PyObject *key, *value;
      while (PyDict_Next(dict.ptr(), &at, &key, &value)) {
        items_.push_back(key);
        items_.push_back(value);
      }
    }
  }

  // The first of the dicts that holds anything else now; -1 where none does.
  int64_t first_difference() const {
    const PyObject* const* item = items_.data();
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (PyDict_Size(dicts_[i]) != sizes_[i]) return (int64_t)i;
      if (!sizes_[i]) continue;
      Py_ssize_t at = 0;
      PyObject *key, *value;
      while (PyDict_Next(dicts_[i], &at, &key, &value)) {
        if (key != item[0] || value != item[1]) return (int64_t)i;
        item += 2;
      }
    }
    return -1;
  }

 private:
  std::vector<PyObject*> dicts_, items_;
  std::vector<Py_ssize_t> sizes_;
};

using Objects = std::vector<py::object>;
using Parts = std::vector<std::pair<uintptr_t, int64_t>>;

// How often torch has counted writes to tensors, where their elements are, their strides, and a checksum of a sample of
// the elements. `counted` are those whose writes torch counts, `placed` those with elements in this memory, and of `wide`
// the strides matter; `parts` are addresses and sizes of the elements.
class TensorSnapshot {
 public:
  TensorSnapshot(Objects counted, Objects placed, Objects wide, Parts parts)
      : counted_(std::move(counted)), placed_(std::move(placed)), wide_(std::move(wide)), parts_(std::move(parts)) {
    py::object type = py::module_::import("torch").attr("Tensor");
    data_ptr_ = type.attr("data_ptr");
    stride_ = type.attr("stride");
    for (const py::object& t : counted_) versions_.push_back(number(py::getattr(t, version_)));
    for (const py::object& t : placed_) places_.push_back(number(data_ptr_(t)));
    for (const py::object& t : wide_) strides_.push_back(stride_(t));
    sum_ = sampled_checksum(parts_);
  }

  // The elements are looked at last: where their addresses are others, the old ones may not be read any more.
  bool same() const {
    for (size_t i = 0; i < counted_.size(); ++i)
      if (number(owned(PyObject_GetAttr(counted_[i].ptr(), version_.ptr()))) != versions_[i]) return false;
    for (size_t i = 0; i < placed_.size(); ++i)
      if (number(call(data_ptr_, placed_[i])) != places_[i]) return false;
    for (size_t i = 0; i < wide_.size(); ++i) {
      int equal = PyObject_RichCompareBool(call(stride_, wide_[i]).ptr(), strides_[i].ptr(), Py_EQ);
      if (equal < 0) throw py::error_already_set();
      if (!equal) return false;
    }
    return sampled_checksum(parts_) == sum_;
  }

 private:
  static py::object owned(PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
  static py::object call(const py::object& method, const py::object& t) {
    return owned(PyObject_CallFunctionObjArgs(method.ptr(), t.ptr(), nullptr));
  }
  static uint64_t number(const py::object& x) {
    uint64_t found = PyLong_AsUnsignedLongLong(x.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  Objects counted_, placed_, wide_;
  Parts parts_;
  py::str version_{py::reinterpret_steal<py::str>(PyUnicode_InternFromString("_version"))};
  py::object data_ptr_, stride_;
  std::vector<uint64_t> versions_, places_;
  Objects strides_;
  uint64_t sum_ = 0;
};

}  // namespace cmfast
