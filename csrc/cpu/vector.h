// The thin layer beneath the shared algorithms: a register of floats, of as many lanes as the instruction set has.
//
// Arithmetic, comparison and selection are the compilers' own on vector types; what they lack is here. Products and the
// sums after them are fused where the processor can (-ffp-contract=fast).
#pragma once

#include <cstdint>

#include "tensors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CMFAST_UNROLL _Pragma("GCC unroll 16")

namespace cmfast {
namespace CMFAST_ISA {

#if defined(__AVX512F__)
#define CMFAST_LANES 16
constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
#define CMFAST_LANES 8
constexpr int REGISTERS = 16;
#else
#define CMFAST_LANES 4
constexpr int REGISTERS = 16;
#endif
constexpr int LANES = CMFAST_LANES;

typedef float Floats __attribute__((vector_size(4 * CMFAST_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * CMFAST_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * CMFAST_LANES)));
typedef uint64_t Longs __attribute__((vector_size(4 * CMFAST_LANES)));
typedef double Doubles __attribute__((vector_size(4 * CMFAST_LANES)));      // of half as many lanes
typedef float HalfFloats __attribute__((vector_size(2 * CMFAST_LANES)));    // of as many as Doubles
typedef uint16_t Halves __attribute__((vector_size(2 * CMFAST_LANES)));

// The same where they lie in memory: at any address, of any type.
typedef float FloatsThere __attribute__((vector_size(4 * CMFAST_LANES), aligned(4), may_alias));
typedef float HalfFloatsThere __attribute__((vector_size(2 * CMFAST_LANES), aligned(4), may_alias));
typedef uint32_t WordsThere __attribute__((vector_size(4 * CMFAST_LANES), aligned(2), may_alias));  // or pairs of halves
typedef uint16_t HalvesThere __attribute__((vector_size(2 * CMFAST_LANES), aligned(2), may_alias));

CMFAST_INLINE Floats zeros() { return Floats{}; }
CMFAST_INLINE Floats all(float x) { return x - Floats{}; }
CMFAST_INLINE Words all(uint32_t x) { return x - Words{}; }

CMFAST_INLINE Words bits(Floats x) { return (Words)x; }
CMFAST_INLINE Floats as_floats(Words x) { return (Floats)x; }
CMFAST_INLINE Floats to_floats(Words x) { return __builtin_convertvector((Ints)x, Floats); }  // below 2³¹

CMFAST_INLINE Words iota() {
  Words x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

CMFAST_INLINE Floats load(const float* p) { return *(const FloatsThere*)p; }
CMFAST_INLINE void store(float* p, Floats x) { *(FloatsThere*)p = x; }

// ---- some of the lanes, 0 < n <= LANES, the others 0

#if defined(__AVX512F__)
CMFAST_INLINE Floats load(const float* p, int n) { return (Floats)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
CMFAST_INLINE void store(float* p, Floats x, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x); }
#elif defined(__AVX2__)
CMFAST_INLINE Floats load(const float* p, int n) {
  return (Floats)_mm256_maskload_ps(p, (__m256i)((Ints)iota() < n));
}
CMFAST_INLINE void store(float* p, Floats x, int n) {
  _mm256_maskstore_ps(p, (__m256i)((Ints)iota() < n), (__m256)x);
}
#else
CMFAST_INLINE Floats load(const float* p, int n) {
  Floats x{};
  __builtin_memcpy(&x, p, 4 * n);
  return x;
}
CMFAST_INLINE void store(float* p, Floats x, int n) { __builtin_memcpy(p, &x, 4 * n); }
#endif

// ---- arithmetic that vector types lack

#if defined(__AVX512F__)
CMFAST_INLINE Floats max(Floats x, Floats y) { return (Floats)_mm512_max_ps((__m512)x, (__m512)y); }
CMFAST_INLINE Floats min(Floats x, Floats y) { return (Floats)_mm512_min_ps((__m512)x, (__m512)y); }
CMFAST_INLINE Floats sqrt(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
CMFAST_INLINE float sum(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
CMFAST_INLINE float largest(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
// The products of the even lanes, whole.
CMFAST_INLINE Longs multiply_even(Words x, Words y) { return (Longs)_mm512_mul_epu32((__m512i)x, (__m512i)y); }
#elif defined(__AVX2__)
CMFAST_INLINE Floats max(Floats x, Floats y) { return (Floats)_mm256_max_ps((__m256)x, (__m256)y); }
CMFAST_INLINE Floats min(Floats x, Floats y) { return (Floats)_mm256_min_ps((__m256)x, (__m256)y); }
CMFAST_INLINE Floats sqrt(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
CMFAST_INLINE Longs multiply_even(Words x, Words y) { return (Longs)_mm256_mul_epu32((__m256i)x, (__m256i)y); }
#else
CMFAST_INLINE Floats max(Floats x, Floats y) { return x > y ? x : y; }
CMFAST_INLINE Floats min(Floats x, Floats y) { return x < y ? x : y; }
CMFAST_INLINE Floats sqrt(Floats x) {
  for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
CMFAST_INLINE Longs multiply_even(Words x, Words y) { return ((Longs)x & 0xFFFFFFFFu) * ((Longs)y & 0xFFFFFFFFu); }
#endif

#if !defined(__AVX512F__)
// To each lane is added the one `SIZE` away, of half as many lanes each time.
template <int SIZE = LANES / 2>
CMFAST_INLINE float sum(Floats x) {
  Ints other{};
  for (int i = 0; i < LANES; ++i) other[i] = i ^ SIZE;
  x += __builtin_shuffle(x, other);
  if constexpr (SIZE > 1) return sum<SIZE / 2>(x);
  return x[0];
}
CMFAST_INLINE float largest(Floats x) {
  float m = x[0];
  for (int i = 1; i < LANES; ++i) m = m < x[i] ? x[i] : m;
  return m;
}
#endif

// A square of words transposed: at each step the halves of neighbouring squares of `size` change places.
template <int SIZE = LANES / 2>
CMFAST_INLINE void transpose(Words (&x)[LANES]) {
  Words low{}, high{};
  for (int i = 0; i < LANES; ++i) {
    low[i] = i & SIZE ? LANES + i - SIZE : i;
    high[i] = i & SIZE ? LANES + i : i + SIZE;
  }
  CMFAST_UNROLL
  for (int i = 0; i < LANES; ++i) {
    if (i & SIZE) continue;
    Words upper = x[i], lower = x[i + SIZE];
    x[i] = __builtin_shuffle(upper, lower, low);
    x[i + SIZE] = __builtin_shuffle(upper, lower, high);
  }
  if constexpr (SIZE > 1) transpose<SIZE / 2>(x);
}

// 1/x, to a rounding or two.
#if defined(__AVX512F__)
CMFAST_INLINE Floats reciprocal(Floats x) {
  Floats r = (Floats)_mm512_rcp14_ps((__m512)x);
  Floats better = r + r * (1.0f - x * r);
  return x < 1e38f ? better : r;  // of the infinite and nearly infinite the refinement would be NaN
}
#else
CMFAST_INLINE Floats reciprocal(Floats x) { return 1.0f / x; }
#endif

// ---- float64, half a register of floats at a time

constexpr int HALF_LANES = LANES / 2;

CMFAST_INLINE Doubles wide(HalfFloats x) { return __builtin_convertvector(x, Doubles); }
CMFAST_INLINE HalfFloats narrow(Doubles x) { return __builtin_convertvector(x, HalfFloats); }

// n of the lanes, 0 < n <= HALF_LANES, the others 0.
#if defined(__AVX512F__)
CMFAST_INLINE Doubles load_wide(const float* p, int n) { return wide(_mm256_maskz_loadu_ps((1u << n) - 1, p)); }
CMFAST_INLINE void store_narrow(float* p, Doubles x, int n) {
  _mm256_mask_storeu_ps(p, (1u << n) - 1, (__m256)narrow(x));
}
#else
CMFAST_INLINE Doubles load_wide(const float* p, int n) {
  if (n == HALF_LANES) return wide(*(const HalfFloatsThere*)p);
  HalfFloats x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return wide(x);
}
CMFAST_INLINE void store_narrow(float* p, Doubles x, int n) {
  HalfFloats y = narrow(x);
  if (n == HALF_LANES) *(HalfFloatsThere*)p = y;
  else
    for (int i = 0; i < n; ++i) p[i] = y[i];
}
#endif

CMFAST_INLINE double sum(Doubles x) {
  double total = 0;
  for (int i = 0; i < HALF_LANES; ++i) total += x[i];
  return total;
}

// ---- 16-bit floats

CMFAST_INLINE Floats from_bfloat16(Words x) { return as_floats(x << 16); }

CMFAST_INLINE Words to_bfloat16(Floats x) {
  Words w = bits(x);
  Words rounded = (w + 0x7FFF + ((w >> 16) & 1)) >> 16;
  return x == x ? rounded : (w >> 16 | 0x40);
}

// x to the nearest bfloat16. What is left of x is nearly a bfloat16 itself.
CMFAST_INLINE Floats high_term(Floats x) { return from_bfloat16(to_bfloat16(x)); }

#if defined(__AVX512F__)
CMFAST_INLINE Floats from_float16(Halves x) { return (Floats)_mm512_cvtph_ps((__m256i)x); }
CMFAST_INLINE Halves to_float16(Floats x) { return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
CMFAST_INLINE Floats from_float16(Halves x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
CMFAST_INLINE Halves to_float16(Floats x) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
CMFAST_INLINE Floats from_float16(Halves half) {
  Words h = __builtin_convertvector(half, Words);
  Words w = (h & 0x7FFF) << 13, exponent = w & 0x0F800000;
  w += (127 - 15) << 23;
  w = exponent == 0x0F800000 ? w + ((128 - 16) << 23) : w;  // infinite, or NaN
  const Floats tiny = as_floats(all(113u << 23));
  w = exponent == 0 ? bits(as_floats(w + (1 << 23)) - tiny) : w;  // subnormal
  return as_floats(w | (h & 0x8000) << 16);
}
CMFAST_INLINE Halves to_float16(Floats x) {
  Words w = bits(x), sign = w & 0x80000000u;
  w ^= sign;
  const Words magic = all(126u << 23);  // adding 0.5 leaves the bits of a subnormal, rounded, at the end of the mantissa
  Words subnormal = bits(as_floats(w) + as_floats(magic)) - magic;
  Words normal = (w + (uint32_t(15 - 127) << 23) + 0xFFF + ((w >> 13) & 1)) >> 13;
  Words h = w < (113u << 23) ? subnormal : normal;
  h = w >= 0x47800000u ? all(0x7C00u) : h;
  h = w > 0x7F800000u ? all(0x7E00u) : h;
  return __builtin_convertvector(h | sign >> 16, Halves);
}
#endif

// ---- elements of a tensor of any dtype

CMFAST_INLINE Floats load(const void* data, int dtype, int64_t i) {
  if (dtype == FLOAT32) return load((const float*)data + i);
  Halves h = *(const HalvesThere*)((const uint16_t*)data + i);
  return dtype == BFLOAT16 ? from_bfloat16(__builtin_convertvector(h, Words)) : from_float16(h);
}

CMFAST_INLINE Floats load(const void* data, int dtype, int64_t i, int n) {
  if (n == LANES) return load(data, dtype, i);
  if (dtype == FLOAT32) return load((const float*)data + i, n);
  Halves h{};
  for (int j = 0; j < n; ++j) h[j] = ((const uint16_t*)data)[i + j];
  return dtype == BFLOAT16 ? from_bfloat16(__builtin_convertvector(h, Words)) : from_float16(h);
}

CMFAST_INLINE void store(void* data, int dtype, int64_t i, Floats x, int n) {
  if (dtype == FLOAT32) return n == LANES ? store((float*)data + i, x) : store((float*)data + i, x, n);
  Halves h = dtype == BFLOAT16 ? __builtin_convertvector(to_bfloat16(x), Halves) : to_float16(x);
  uint16_t* there = (uint16_t*)data + i;
  if (n == LANES) *(HalvesThere*)there = h;
  else
    for (int j = 0; j < n; ++j) there[j] = h[j];
}

// Elements i, i + stride, … of which n are to be had.
CMFAST_INLINE Floats gather(const void* data, int dtype, int64_t i, int64_t stride, int n) {
  if (stride == 1) return load(data, dtype, i, n);
  if (dtype == FLOAT32) {
    Floats x{};
    for (int j = 0; j < n; ++j) x[j] = ((const float*)data)[i + j * stride];
    return x;
  }
  Halves h{};
  for (int j = 0; j < n; ++j) h[j] = ((const uint16_t*)data)[i + j * stride];
  return dtype == BFLOAT16 ? from_bfloat16(__builtin_convertvector(h, Words)) : from_float16(h);
}

CMFAST_INLINE void scatter(void* data, int dtype, int64_t i, int64_t stride, Floats x, int n) {
  if (stride == 1) return store(data, dtype, i, x, n);
  if (dtype == FLOAT32) {
    for (int j = 0; j < n; ++j) ((float*)data)[i + j * stride] = x[j];
    return;
  }
  Halves h = dtype == BFLOAT16 ? __builtin_convertvector(to_bfloat16(x), Halves) : to_float16(x);
  for (int j = 0; j < n; ++j) ((uint16_t*)data)[i + j * stride] = h[j];
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
