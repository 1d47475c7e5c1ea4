// The types and arithmetic functions of CUDA that kernels use, for the host compiler.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

using cmfast::emulation::dim3;

#define CMFAST_VECTOR_TYPE(name, scalar)                                                    \
  struct alignas(2 * sizeof(scalar)) name##2 {                                              \
    scalar x, y;                                                                            \
  };                                                                                        \
  struct name##3 {                                                                          \
    scalar x, y, z;                                                                         \
  };                                                                                        \
  struct alignas(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) name##4 {               \
    scalar x, y, z, w;                                                                      \
  };                                                                                        \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                      \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }         \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CMFAST_VECTOR_TYPE(float, float)
CMFAST_VECTOR_TYPE(int, int)
CMFAST_VECTOR_TYPE(uint, unsigned)
CMFAST_VECTOR_TYPE(ushort, unsigned short)
CMFAST_VECTOR_TYPE(longlong, long long)
#undef CMFAST_VECTOR_TYPE

template <class To, class From>
inline To cmfast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float __uint_as_float(unsigned x) { return cmfast_bits<float>(x); }
inline float __int_as_float(int x) { return cmfast_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cmfast_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cmfast_bits<int>(x); }

// Round to nearest, ties to even; every NaN becomes the canonical one.
struct __nv_bfloat16 {
  uint16_t __x;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    uint32_t bits = __float_as_uint(value);
    __x = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  operator float() const { return __uint_as_float(uint32_t{__x} << 16); }
};

struct __half {
  uint16_t __x;
  __half() = default;
  __half(float value) {
    uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
      __x = 0x7fff;
    } else if (bits >= 0x477ff000) {  // 65520 and more round to infinity
      __x = static_cast<uint16_t>(sign | 0x7c00);
    } else if (bits < 0x38800000) {  // subnormal: adding 1/2 leaves its bits, rounded, at the end of the significand
      __x = static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000));
    } else {
      __x = static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
    }
  }
  operator float() const {
    uint32_t magnitude = uint32_t{__x} & 0x7fff;
    uint32_t bits = __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f);
    if (magnitude >= 0x7c00) bits = magnitude << 13 | 0x7f800000;
    return __uint_as_float(bits | (uint32_t{__x} & 0x8000) << 16);
  }
};

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}

using std::max;
using std::min;
