// A checksum of memory, as fast as it can be read: to tell whether weights are those that were packed before.
#pragma once

#include <cstdint>

namespace cmfast {

// Of `bytes` from an address on, by so many threads; the same whatever their number. Not against forgery.
uint64_t checksum(const void* data, int64_t bytes, int threads);

}  // namespace cmfast
