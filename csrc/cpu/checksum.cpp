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

uint64_t mix(uint64_t x) {  // splitmix64's finalizer (Steele, Lea and Flood 2014)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t of_chunk(const unsigned char* data, int64_t bytes) {
  uint64_t sums[LANES];
  for (int i = 0; i < LANES; ++i) sums[i] = mix(i + 1);
  int64_t at = 0;
  for (; at + 8 * LANES <= bytes; at += 8 * LANES)
    for (int i = 0; i < LANES; ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      sums[i] = (sums[i] ^ word) * 0x9E3779B97F4A7C15u;
      sums[i] ^= sums[i] >> 32;
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

uint64_t sampled_checksum(const std::vector<std::pair<uintptr_t, int64_t>>& parts) {
  uint64_t sum = mix(parts.size());
  for (auto [address, bytes] : parts) {
    auto* data = (const unsigned char*)address;
    if (bytes <= SMALL) {
      sum = mix(sum + of_chunk(data, bytes));
      continue;
    }
    // One in each of as many equal stretches, so that they lie neither in a row nor in a column of a matrix.
    int64_t words = bytes / 8, stretch = words / SAMPLES;
    uint64_t sampled = 0;
    for (int i = 0; i < SAMPLES; ++i) {
      uint64_t word;
      std::memcpy(&word, data + 8 * (i * stretch + (int64_t)(mix(i + 1) % stretch)), 8);
      sampled += mix(word ^ mix(i));
    }
    sum = mix(sum + sampled + of_chunk(data + bytes - 8, 8));
  }
  return sum;
}

}  // namespace cmfast
