// Elementary functions of a vector, to a rounding or two.
#pragma once

#include "faults.h"
#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

// 2^x of several registers, step by step: while one waits for a result, another is at work. 0 below the smallest normal
// number. The polynomial is the best of its degree on [−1/2, 1/2], to 2⁻²⁹.
template <int N>
CMFAST_INLINE void exp2(Floats (&x)[N]) {
  const float shift = 12582912.0f;  // 1.5·2²³: adding it leaves the nearest integer in the last bits
  constexpr float coefficients[] = {1.33998599e-03f, 9.61851981e-03f, 5.55032901e-02f, 2.40226462e-01f,
                                    6.93147182e-01f, 1.0f};
  Floats shifted[N], p[N];
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) x[i] = max(all(-127.0f), min(all(128.0f), x[i]));  // in this order NaN stays
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) {
    shifted[i] = x[i] + shift;
    x[i] -= shifted[i] - shift;
    p[i] = all(1.5337577e-04f);
  }
  CMFAST_UNROLL
  for (float c : coefficients)
    CMFAST_UNROLL
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + c;
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) x[i] = as_floats((bits(shifted[i]) << 23) + 0x3F800000u) * p[i];
}

#if defined(__AVX512F__)
// 2^x of several registers, by a polynomial on [0, 1] from its highest coefficient on.
template <int N, int TERMS>
CMFAST_INLINE void exp2_by_floor(Floats (&x)[N], const float (&coefficients)[TERMS]) {
  Floats fraction[N], p[N];
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) {
    fraction[i] = (Floats)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF);  // 0 of the infinite
    p[i] = all(coefficients[0]);
  }
  CMFAST_UNROLL
  for (int term = 1; term < TERMS; ++term)
    CMFAST_UNROLL
    for (int i = 0; i < N; ++i) p[i] = p[i] * fraction[i] + coefficients[term];
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) x[i] = (Floats)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);  // by 2 to the integer below
}
#endif

// 2^x of several registers, to 2⁻¹⁸: of what is rounded to bfloat16. The polynomial is the best of its degree on [0, 1].
template <int N>
CMFAST_INLINE void exp2_to_bfloat16(Floats (&x)[N]) {
#if defined(__AVX512F__)
  constexpr float coefficients[] = {0.013534168f, 0.05201146f, 0.241442755f, 0.693003833f, 1.0000026f};
  exp2_by_floor(x, coefficients);
#else
  exp2(x);
#endif
}

// The same, to 2⁻²²: of what is summed besides.
template <int N>
CMFAST_INLINE void exp2_to_sums(Floats (&x)[N]) {
#if defined(__AVX512F__)
  constexpr float coefficients[] = {1.87757669e-03f, 8.98933969e-03f, 5.58263175e-02f,
                                    0.240153611f,    0.693153083f,    0.99999994f};
  exp2_by_floor(x, coefficients);
#else
  exp2(x);
#endif
}

CMFAST_INLINE Floats exp2(Floats x) {
  Floats one[1] = {x};
  exp2(one);
  return one[0];
}

// x·sigmoid(x)
CMFAST_INLINE Floats silu(Floats x) { return x * reciprocal(1.0f + exp2(x * -1.44269504f)); }

// The same of several registers, to 2⁻¹³: of what is rounded to bfloat16.
template <int N>
CMFAST_INLINE void silu_to_bfloat16(Floats (&x)[N]) {
#if defined(__AVX512F__)
  Floats power[N];
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) power[i] = x[i] * -1.44269504f;
  exp2_to_bfloat16(power);
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) x[i] *= (Floats)_mm512_rcp14_ps((__m512)(1.0f + power[i]));
#else
  CMFAST_UNROLL
  for (int i = 0; i < N; ++i) x[i] = silu(x[i]);
#endif
}

// Its derivative, sigmoid(x)·(1 + x·(1 − sigmoid(x))).
CMFAST_INLINE Floats silu_gradient(Floats x) {
  Floats sigmoid = reciprocal(1.0f + exp2(x * -1.44269504f));
  return sigmoid * (1.0f + x * (1.0f - sigmoid));
}

// x·Φ(x), Φ the normal distribution. The complement of the error function is t·exp(p(t) − z²), t = 1/(1 + 2z/5), where the
// polynomial p, fitted to 10⁻⁷ over all z ≥ 0, is of small terms: so the tail is as accurate as the middle.
CMFAST_INLINE Floats gelu(Floats x) {
  constexpr float coefficients[] = {1.37085379f,  -2.22026951f, 1.52890888f, -0.699920448f,
                                    0.458762747f, 0.570340442f, 1.44602834f, -3.14780691f};  // in powers of 2, and of ½
  Floats size = as_floats(bits(x) & 0x7FFFFFFFu), t = reciprocal(1.0f + 0.282842712f * size), p = all(-0.306897482f);
  CMFAST_UNROLL
  for (float c : coefficients) p = p * t + c;
  Floats tail = t * exp2(p - 0.721347520f * x * x);
  return x * (x > 0 ? 1.0f - tail : tail);
}

// Its approximation by tanh: x·sigmoid(2·√(2/π)·(x + 0.044715·x³)).
CMFAST_INLINE Floats gelu_tanh(Floats x) {
  return x * reciprocal(1.0f + exp2(x * -2.30220818f * (1.0f + 0.044715f * x * x)));
}

// ln x of a normal, positive x: the polynomial of the Cephes library.
CMFAST_INLINE Floats log(Floats x) {
  Words w = bits(x);
  Words scaled = w - 0x3F3504F3u;  // of √½, where the mantissa's range [√½, √2) begins
  Ints exponent = (Ints)scaled >> 23;
  Floats e = __builtin_convertvector(exponent, Floats);
  Floats f = as_floats(w - ((Words)exponent << 23)) - 1.0f;
  Floats g = f * f;
  Floats p = all(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * g - 2.12194440e-4f * e - 0.5f * g;
  return f + p + 0.693359375f * e;
}

// cos and sin of u whole turns, 0 <= u < 1. In quarter turns the angle is exact, and so are its nearest integer's
// distance f (at most 1/2) and quadrant: Taylor's series of cos and sin(π/2·f) are then within rounding.
CMFAST_INLINE void cos_sin_turns(Floats u, Floats& cosine, Floats& sine) {
  const float shift = 12582912.0f;
  Floats turns = 4.0f * u, shifted = turns + shift;
  Floats f = turns - (shifted - shift), g = f * f;
  Floats s = f * (1.5707963f + g * (-0.64596410f + g * (0.079692626f + g * (-0.0046817541f + g * 0.00016044118f))));
  Floats c =
      1.0f + g * (-1.2337005f + g * (0.25366951f + g * (-0.020863481f + g * (0.00091926027f + g * -2.5202042e-05f))));
  Words quadrant = bits(shifted);
  cosine = (quadrant & 1) != 0 ? s : c;
  sine = (quadrant & 1) != 0 ? c : s;
  cosine = as_floats(bits(cosine) ^ ((quadrant + 1) & 2) << 30);
  sine = as_floats(bits(sine) ^ (quadrant & 2) << 30);
}

// cos and sin of any angle. Less the nearest multiple of π/2 it is at most π/4, in float64 exact: π/2 is taken in two
// parts, the first of 33 bits, so that its multiples up to 2²⁰ are exact. The polynomials are those of the Cephes library.
// Angles beyond, and what is no number, are the C library's.
CMFAST_INLINE void cos_sin(Floats angle, Floats& cosine, Floats& sine) {
  constexpr double two_over_pi = 0.6366197723675814, half_pi = 0x1.921fb544p+0, rest = 0x1.0b4611a626331p-34;
  constexpr double shift = 6755399441055744.0;  // 1.5·2⁵²: adding it leaves the nearest integer in the last bits
  constexpr float farthest = 1 << 20;
  Floats size = as_floats(bits(angle) & 0x7FFFFFFFu);
  Floats near = size <= farthest ? angle : zeros(), turns = zeros(), r = zeros();
  for (int half = 0; half < LANES; half += HALF_LANES) {
    Doubles x = load_wide((const float*)&near + half, HALF_LANES), nearest = (x * two_over_pi + shift) - shift;
    store_narrow((float*)&turns + half, nearest, HALF_LANES);
    store_narrow((float*)&r + half, (x - nearest * half_pi) - nearest * rest, HALF_LANES);
  }
  Words quadrant = (Words)__builtin_convertvector(turns, Ints) + (FAULT(quadrant_one_off) ? 1 : 0);
  Floats g = r * r;
  Floats s = r + r * (g * (-1.6666654611e-1f + g * (8.3321608736e-3f + g * -1.9515295891e-4f)));
  Floats c = 1.0f + g * (-0.5f + g * (4.166664568298827e-2f + g * (-1.388731625493765e-3f + g * 2.443315711809948e-5f)));
  cosine = (quadrant & 1) != 0 ? s : c;
  sine = (quadrant & 1) != 0 ? c : s;
  cosine = as_floats(bits(cosine) ^ ((quadrant + 1) & 2) << 30);
  sine = as_floats(bits(sine) ^ (quadrant & 2) << 30);
  if (sum(size <= farthest ? zeros() : all(1.0f)) == 0) return;
  for (int i = 0; i < LANES; ++i) {
    if (size[i] <= farthest) continue;
    cosine[i] = __builtin_cosf(angle[i]);
    sine[i] = __builtin_sinf(angle[i]);
  }
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
