// The device of the launches that follow, whether there can be any, and a launcher that does nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cmfast {

// Launch on the CUDA device of this index from now on, in this thread; a negative one keeps what is set. cmfast's CUDA
// runtime is linked in statically, and knows nothing of what another copy of the runtime has set.
std::string set_device(int device);

// Why no kernel of this build runs on the device: no code for it, or a driver older than the runtime. Empty if they do.
std::string launchable();

// What a call costs that launches nothing.
std::string nothing();

// A launch: the offset of its kernel's host function in this library, and its configuration.
struct PlannedLaunch {
  int64_t kernel;
  unsigned grid[3], block[3];
  int64_t shared_bytes;
  unsigned cluster_x;
};

// What `call` would launch; nothing is launched, and no device is needed. The emulation plans nothing.
std::vector<PlannedLaunch> planned(const std::function<void()>& call);

}  // namespace cmfast
