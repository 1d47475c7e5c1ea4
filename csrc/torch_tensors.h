// torch's tensors as the extension sees them, without torch's headers: by DLPack's C interface.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"

namespace cmfast {

namespace py = pybind11;

// Fills in what a tensor is, in nanoseconds; -1, with Python's error set, where it cannot.
using Describe = int (*)(void* tensor, dlpack::Tensor* out);

// torch's, from 2.10 on; null before.
inline Describe describer() {
  py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
  py::capsule capsule = type.attr("__dlpack_c_exchange_api__");
  auto* exchange = capsule.get_pointer<dlpack::Exchange>();
  return exchange->header.version.major == 1 ? exchange->tensor_from_py_object : nullptr;
}

}  // namespace cmfast
