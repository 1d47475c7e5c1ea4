// A checksum of memory, as fast as it can be read: to tell whether weights are those that were packed before.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace cmfast {

// Of `bytes` from an address on, by so many threads; the same whatever their number. Not against forgery.
uint64_t checksum(const void* data, int64_t bytes, int threads);

// A sample of memory: all of a part of up to 256 bytes, 8 words of a larger one and its last bytes.
class Sample {
 public:
  // Addresses and sizes in bytes of the parts.
  explicit Sample(const std::vector<std::pair<uintptr_t, int64_t>>& parts);

  uint64_t checksum() const;

 private:
  std::vector<const unsigned char*> words_;                   // of 8 bytes
  std::vector<std::pair<const unsigned char*, int>> pieces_;  // parts of less than 8 bytes
};

}  // namespace cmfast
