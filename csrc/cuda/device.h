// The device of the launches that follow, and a launcher that does nothing.
#pragma once

#include <string>

namespace cmfast {

// Launch on the CUDA device of this index from now on, in this thread; a negative one keeps what is set. cmfast's CUDA
// runtime is linked in statically, and knows nothing of what another copy of the runtime has set.
std::string set_device(int device);

// What a call costs that launches nothing.
std::string nothing();

}  // namespace cmfast
