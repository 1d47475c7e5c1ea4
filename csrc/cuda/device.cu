#include "device.h"

#include <dlfcn.h>

#include "primitives.cuh"

namespace cmfast {

#ifdef CMFAST_EMULATE
std::string set_device(int) { return {}; }
std::string launchable() { return {}; }
std::vector<PlannedLaunch> planned(const std::function<void()>&) { return {}; }
#else
std::string set_device(int device) {
  if (device < 0) return {};
  cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

namespace {
__global__ void probe() {}
}  // namespace

std::string launchable() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

std::vector<PlannedLaunch> planned(const std::function<void()>& call) {
  struct Recording {
    std::vector<Recorded> launches;
    Recording() { recording = &launches; }
    ~Recording() { recording = nullptr; }
  } record;
  call();
  std::vector<PlannedLaunch> result;
  for (const Recorded& launch : record.launches) {
    Dl_info library;
    dladdr(launch.kernel, &library);
    const LaunchConfig& c = launch.config;
    result.push_back({static_cast<const char*>(launch.kernel) - static_cast<const char*>(library.dli_fbase),
                      {c.grid.x, c.grid.y, c.grid.z},
                      {c.block.x, c.block.y, c.block.z},
                      static_cast<int64_t>(c.shared_bytes),
                      c.cluster_x});
  }
  return result;
}
#endif

std::string nothing() { return {}; }

}  // namespace cmfast
