// The counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, as kernels/reference/philox.py defines it.
#pragma once

#include "primitives.cuh"

namespace cmfast {

struct Words {
  uint32_t r0, r1, r2, r3;
};

// Philox4x32-10 of the counter (block, draw, seed_high, 0) and the key (seed_low, sample).
__device__ __forceinline__ Words philox(uint32_t block, uint32_t draw, uint64_t seed, uint32_t sample) {
  uint32_t c0 = block, c1 = draw, c2 = static_cast<uint32_t>(seed >> 32), c3 = 0;
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = sample;
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    uint32_t high_0 = __umulhi(c0, 0xD2511F53u), low_0 = c0 * 0xD2511F53u;
    uint32_t high_1 = __umulhi(c2, 0xCD9E8D57u), low_1 = c2 * 0xCD9E8D57u;
    c0 = high_1 ^ c1 ^ key_0;
    c1 = low_1;
    c2 = high_0 ^ c3 ^ key_1;
    c3 = low_0;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// (2·(word >> 9) + 1)·2⁻²⁴, exactly.
__device__ __forceinline__ float unit(uint32_t word) {
  return static_cast<float>(static_cast<int>((word >> 9) * 2 + 1)) * 5.9604644775390625e-08f;
}

// The pair √(−2 ln u1)·(cos, sin)(2π u2).
__device__ __forceinline__ void box_muller(uint32_t word_1, uint32_t word_2, float& first, float& second) {
  float radius = sqrtf(-2.0f * logf(unit(word_1)));
  // The angle in quarter turns is exact, and so are its nearest integer's distance f (at most 1/2) and quadrant: the
  // Taylor series of sin and cos(π/2·f) are then within rounding. The library's sin and cos would keep a stack frame
  // for the reduction of large angles.
  float turns = 4.0f * unit(word_2);
  float nearest = floorf(turns + 0.5f);
  float f = turns - nearest, g = f * f;
  float sine = f * (1.5707963f + g * (-0.64596410f + g * (0.079692626f + g * (-0.0046817541f + g * 0.00016044118f))));
  float cosine =
      1.0f + g * (-1.2337005f + g * (0.25366951f + g * (-0.020863481f + g * (0.00091926027f + g * -2.5202042e-05f))));
  int quadrant = static_cast<int>(nearest);
  first = quadrant & 1 ? sine : cosine;
  second = quadrant & 1 ? cosine : sine;
  first = radius * ((quadrant + 1) & 2 ? -first : first);
  second = radius * (quadrant & 2 ? -second : second);
}

// The normals of elements 4·block to 4·block + 3 of a sample.
__device__ __forceinline__ void normals(uint32_t block, uint32_t draw, uint64_t seed, uint32_t sample, float (&z)[4]) {
  Words words = philox(block, draw, seed, sample);
  box_muller(words.r0, words.r1, z[0], z[1]);
  box_muller(words.r2, words.r3, z[2], z[3]);
}

}  // namespace cmfast
