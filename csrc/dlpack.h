// The part of DLPack 1.3 (github.com/dmlc/dlpack) by which a tensor says where its elements are: no more is read here.
#pragma once

#include <cstdint>

namespace cmfast::dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

struct Exchange {
  ExchangeHeader header;
  void *managed_tensor_allocator, *managed_tensor_from_py_object, *managed_tensor_to_py_object;
  // Fills in what belongs to the tensor and stays its own; -1, with Python's error set, where it cannot. May be null.
  int (*tensor_from_py_object)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace cmfast::dlpack
