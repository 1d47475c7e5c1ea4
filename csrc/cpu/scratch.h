// Memory that a kernel needs while it runs.
#pragma once

#include <cstdint>

namespace cmfast {

// The uses of scratch memory within one call.
enum Slot { SCRATCH_INPUT, SCRATCH_PRODUCTS, SCRATCH_ROWS, SCRATCH_WEIGHTS, SCRATCH_STATISTICS, SCRATCH_SLOTS };

// At least so many uninitialised bytes, aligned to a cache line, or null where there is no memory. They belong to the
// calling thread, which hands them to its team, until its next call for the same slot: memory once taken is kept, since
// fresh pages cost more than most kernels.
void* scratch(Slot slot, int64_t bytes);

}  // namespace cmfast
