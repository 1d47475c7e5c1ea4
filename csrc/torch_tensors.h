// torch's tensors as the extension sees them, without torch's headers: by DLPack's C interface, or torch's own.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <type_traits>

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

// torch's functions of a tensor, which take two to five nanoseconds. They are given the address of its at::Tensor, and
// give 0 where nothing failed; those of its dtype to strides are of the stable C interface (torch/csrc/stable/c/shim.h).
struct TorchFunctions {
  int32_t (*dtype)(const void*, int32_t*) = nullptr;
  int32_t (*dim)(const void*, int64_t*) = nullptr;
  int32_t (*sizes)(const void*, int64_t**) = nullptr;
  int32_t (*strides)(const void*, int64_t**) = nullptr;
  int32_t (*data)(const void*, const void**) = nullptr;
  int64_t (*version)(const void*) = nullptr;

  // Whether this torch has them.
  explicit operator bool() const { return dtype && dim && sizes && strides && data && version; }
};

inline TorchFunctions torch_functions() {
  TorchFunctions found;
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return found;
  auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
  };
  find(found.dtype, "aoti_torch_get_dtype");
  find(found.dim, "aoti_torch_get_dim");
  find(found.sizes, "aoti_torch_get_sizes");
  find(found.strides, "aoti_torch_get_strides");
  find(found.data, "torch_get_const_data_ptr");
  find(found.version, "_ZNK2at10TensorBase8_versionEv");  // at::TensorBase::_version() const
  dlclose(library);  // torch is there for longer
  return found;
}

// Where a tensor of Python has its at::Tensor, which points to the TensorImpl that `_cdata` tells; null where it is not
// found. It is one of the two words behind the object's head: some versions of torch have a flag before it.
inline const void* at_tensor(const py::object& tensor) {
  uintptr_t impl = tensor.attr("_cdata").cast<uintptr_t>();
  const auto* words = (const uintptr_t*)((const char*)tensor.ptr() + sizeof(PyObject));
  bool room = Py_TYPE(tensor.ptr())->tp_basicsize >= (Py_ssize_t)(sizeof(PyObject) + 2 * sizeof *words);
  for (int i = 0; room && i < 2; ++i)
    if (words[i] == impl) return words + i;
  return nullptr;
}

}  // namespace cmfast
