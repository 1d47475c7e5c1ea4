#include "checksum.h"

#include <cstring>
#include <vector>

#include "team.h"

namespace cmfast {
namespace {

constexpr int64_t CHUNK = 1 << 20;
constexpr int64_t SMALL = 256;  // bytes
constexpr int SAMPLES = 8;
constexpr int LANES = 8;  // chains of multiplications that run beside one another
constexpr int64_t AHEAD = 4096;  // bytes

uint64_t mix(uint64_t x) {  // splitmix64's finalizer (Steele, Lea and Flood 2014)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t of_chunk(const unsigned char* data, int64_t bytes) {
  uint64_t sums[LANES];
  for (int i = 0; i < LANES; ++i) sums[i] = mix(i + 1);
  int64_t at = 0;
  for (; at + 8 * LANES <= bytes; at += 8 * LANES) {
    // Weights mostly lie in small pages, at whose ends processors stop to fetch ahead by themselves.
    __builtin_prefetch(data + at + AHEAD);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      sums[i] = (sums[i] ^ word) * 0x9E3779B97F4A7C15u;
      sums[i] ^= sums[i] >> 32;
    }
  }
  uint64_t sum = mix(bytes);
  for (; at < bytes; ++at) sum = mix(sum ^ data[at]);
  for (int i = 0; i < LANES; ++i) sum = mix(sum + sums[i]);
  return sum;
}

}  // namespace

uint64_t checksum(const void* data, int64_t bytes, int threads) {
  std::vector<uint64_t> sums((bytes + CHUNK - 1) / CHUNK);
  auto body = [&](Team team) {
    Share mine = share((int64_t)sums.size(), team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t left = bytes - i * CHUNK;
      sums[i] = of_chunk((const unsigned char*)data + i * CHUNK, left < CHUNK ? left : CHUNK);
    }
  };
  parallel(sums.size() > 1 ? threads : 1, body);
  uint64_t sum = mix(bytes);
  for (uint64_t of : sums) sum = mix(sum + of);
  return sum;
}

Sample::Sample(const std::vector<std::pair<uintptr_t, int64_t>>& parts) {
  for (auto [address, bytes] : parts) {
    auto* data = (const unsigned char*)address;
    if (bytes < 8) {
      pieces_.push_back({data, (int)bytes});
      continue;
    }
    // One in each of as many equal stretches, so that they lie neither in a row nor in a column of a matrix.
    int64_t words = bytes / 8, samples = bytes <= SMALL ? words : SAMPLES, stretch = words / samples;
    for (int64_t i = 0; i < samples; ++i) words_.push_back(data + 8 * (i * stretch + (int64_t)(mix(i + 1) % stretch)));
    words_.push_back(data + bytes - 8);
  }
}

uint64_t Sample::checksum() const {
  uint64_t sums[4] = {1, 2, 3, 4};  // chains that run beside one another
  auto add = [](uint64_t& sum, const unsigned char* word) {
    uint64_t value;
    std::memcpy(&value, word, 8);
    sum = (sum ^ value) * 0x9E3779B97F4A7C15u;
    sum ^= sum >> 32;
  };
  size_t i = 0;
  for (; i + 4 <= words_.size(); i += 4)
    for (int chain = 0; chain < 4; ++chain) add(sums[chain], words_[i + chain]);
  for (; i < words_.size(); ++i) add(sums[0], words_[i]);
  for (auto [data, bytes] : pieces_)
    for (int at = 0; at < bytes; ++at) sums[1] = mix(sums[1] ^ data[at]);
  return mix(sums[0] + mix(sums[1] + mix(sums[2] + mix(sums[3]))));
}

}  // namespace cmfast
