#include "device.h"

#include "primitives.cuh"

namespace cmfast {

#ifdef CMFAST_EMULATE
std::string set_device(int) { return {}; }
#else
std::string set_device(int device) {
  if (device < 0) return {};
  cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}
#endif

std::string nothing() { return {}; }

}  // namespace cmfast
