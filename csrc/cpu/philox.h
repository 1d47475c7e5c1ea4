// The counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, as kernels/reference/philox.py defines it,
// a block of four normals in each lane.
#pragma once

#include "faults.h"
#include "functions.h"

namespace cmfast {
namespace CMFAST_ISA {

CMFAST_INLINE void multiply(Words x, uint32_t factor, Words& high, Words& low) {
  Words y = all(factor);
  Longs even = multiply_even(x, y), odd = multiply_even((Words)((Longs)x >> 32), y);
  const Longs upper = Longs{} + 0xFFFFFFFF00000000u;
  high = (Words)(even >> 32 | (odd & upper));
  low = x * y;
}

// Philox4x32-10 of the counter (block, draw, high word of the seed, 0) and the key (low word of the seed, sample).
CMFAST_INLINE void philox(Words block, uint32_t draw, uint64_t seed, uint32_t sample, Words (&c)[4]) {
  uint32_t key_0 = (uint32_t)seed, key_1 = sample;
  c[0] = block;
  c[1] = all(FAULT(counter_words_swapped) ? (uint32_t)(seed >> 32) : draw);
  c[2] = all(FAULT(counter_words_swapped) ? draw : (uint32_t)(seed >> 32));
  c[3] = Words{};
  CMFAST_UNROLL
  for (int i = 0; i < 10; ++i) {
    Words high_0, low_0, high_1, low_1;
    multiply(c[0], 0xD2511F53u, high_0, low_0);
    multiply(c[2], 0xCD9E8D57u, high_1, low_1);
    c[0] = high_1 ^ c[1] ^ key_0;
    c[1] = low_1;
    c[2] = high_0 ^ c[3] ^ key_1;
    c[3] = low_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
}

// (2·(word >> 9) + 1)·2⁻²⁴, exactly.
CMFAST_INLINE Floats unit(Words word) { return to_floats((word >> 9) * 2 + 1) * 5.9604644775390625e-08f; }

// Normals of a sample from element `first`, a multiple of 4, on: `count` of them rounded up to whole registers of blocks.
CMFAST_INLINE void normals(float* z, int64_t first, int64_t count, uint32_t draw, uint64_t seed, uint32_t sample) {
  for (int64_t i = 0; i < count; i += 4 * LANES) {
    Words c[4];
    uint32_t block = (uint32_t)((first + (FAULT(block_of_normals_repeated) ? 0 : i)) / 4);
    philox(iota() + block, draw, seed, sample, c);
    float lanes[4][LANES];
    for (int pair = 0; pair < 2; ++pair) {
      Floats radius = sqrt(-2.0f * log(unit(c[2 * pair]))), cosine, sine;
      cos_sin_turns(unit(c[2 * pair + 1]), cosine, sine);
      store(lanes[2 * pair], radius * cosine);
      store(lanes[2 * pair + 1], radius * sine);
    }
    for (int lane = 0; lane < LANES; ++lane)
      for (int j = 0; j < 4; ++j) z[i + 4 * lane + j] = lanes[j][lane];
  }
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
