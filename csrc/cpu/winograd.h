// Winograd's minimal filtering F(m×m, 3×3) (Lavin and Gray 2016): y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, in one dimension here.
//
// m = 2 has the points 0, 1, −1, ∞. m = 4 has 0, ±3/4, ±3/2, ∞: exact in float32, and with half the error in bfloat16
// of the usual 0, ±1, ±2, ∞. The factors of each point that G has in the literature are in A here, where they cost less:
// G's rows are the points' powers.
#pragma once

#include "vector.h"

namespace cmfast {
namespace CMFAST_ISA {

constexpr float NEAR = 0.75f, FAR = 1.5f;

template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  // Bᵀ d of d[0], d[stride], …
  static CMFAST_INLINE void input(const Floats* d, int stride, Floats* to, int step) {
    Floats d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride];
    to[0] = d0 - d2;
    to[step] = d1 + d2;
    to[2 * step] = d2 - d1;
    to[3 * step] = d1 - d3;
  }

  // Aᵀ m
  static CMFAST_INLINE void output(const Floats* m, int stride, Floats* to, int step) {
    to[0] = m[0] + 0.5f * (m[stride] + m[2 * stride]);
    to[step] = 0.5f * (m[stride] - m[2 * stride]) - m[3 * stride];
  }

  // G g, of vectors of any type
  template <class T>
  static CMFAST_INLINE void weight(const T* g, int stride, T* to, int step) {
    T even = g[0] + g[2 * stride], odd = g[stride];
    to[0] = g[0];
    to[step] = even + odd;
    to[2 * step] = even - odd;
    to[3 * step] = g[2 * stride];
  }
};

template <>
struct Winograd<4> {
  static CMFAST_INLINE void input(const Floats* d, int stride, Floats* to, int step) {
    const float near = NEAR * NEAR, far = FAR * FAR;
    Floats d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
    to[0] = near * far * d0 + (d4 - (near + far) * d2);
    to[5 * step] = near * far * d1 + (d5 - (near + far) * d3);
    Floats even = d4 - far * d2, odd = d3 - far * d1;
    to[step] = even + NEAR * odd;
    to[2 * step] = even - NEAR * odd;
    even = d4 - near * d2, odd = d3 - near * d1;
    to[3 * step] = even + FAR * odd;
    to[4 * step] = even - FAR * odd;
  }

  static CMFAST_INLINE void output(const Floats* m, int stride, Floats* to, int step) {
    const float near = NEAR * NEAR, far = FAR * FAR, of_zero = 1 / (near * far);
    const float of_near = 1 / (2 * near * (near - far)), of_far = 1 / (2 * far * (far - near));
    Floats near_sum = m[stride] + m[2 * stride], near_difference = m[stride] - m[2 * stride];
    Floats far_sum = m[3 * stride] + m[4 * stride], far_difference = m[3 * stride] - m[4 * stride];
    to[0] = of_zero * m[0] + (of_near * near_sum + of_far * far_sum);
    to[step] = of_far * FAR * far_difference + of_near * NEAR * near_difference;
    to[2 * step] = of_far * far * far_sum + of_near * near * near_sum;
    to[3 * step] = of_far * FAR * far * far_difference + (of_near * NEAR * near * near_difference + m[5 * stride]);
  }

  template <class T>
  static CMFAST_INLINE void weight(const T* g, int stride, T* to, int step) {
    T even = g[0] + NEAR * NEAR * g[2 * stride], odd = NEAR * g[stride];
    to[0] = g[0];
    to[step] = even + odd;
    to[2 * step] = even - odd;
    even = g[0] + FAR * FAR * g[2 * stride], odd = FAR * g[stride];
    to[3 * step] = even + odd;
    to[4 * step] = even - odd;
    to[5 * step] = g[2 * stride];
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast
