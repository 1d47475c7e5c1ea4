// A checksum of memory, as fast as it can be read: to tell whether weights are those that were packed before.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace cmfast {

// Of `bytes` from an address on, by so many threads; the same whatever their number. Not against forgery.
uint64_t checksum(const void* data, int64_t bytes, int threads);

// Of a sample: all of what has up to 256 bytes, 8 words of what is larger, and its last bytes; addresses and sizes of the parts.
uint64_t sampled_checksum(const std::vector<std::pair<uintptr_t, int64_t>>& parts);

}  // namespace cmfast
