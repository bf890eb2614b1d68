#pragma once

#include "vector.h"

namespace minilm_fast {
namespace {

// 1 / x, to an ulp or two, for normal x.
inline Float reciprocal(Float x) {
#ifdef __AVX512F__
  const Float r = reinterpret_cast<Float>(_mm512_maskz_rcp14_ps(kAllLanes, reinterpret_cast<__m512>(x)));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// Erf-GELU, x Phi(x), to 5e-7 and in the tails to 3e-7. With t = |x| it is max(x, 0) - t Phi(-t), and Phi(-t)^(-1/8)
// is so nearly a polynomial that degree 8, fitted on [0, 6] for the least error of the result, suffices; beyond, it
// grows faster than it need, and what is left at the limit of t, 2e-23, stands for 0.
inline Float gelu(Float x) {
  const Float t = minimum(splat(12.0f), absolute(x));
  Float p = splat(3.1359381864604075e-06f);
  p = p * t - 1.745530062180478e-05f;
  p = p * t + 0.00010217214730801061f;
  p = p * t + 0.00013297639088705182f;
  p = p * t + 0.0010520113864913583f;
  p = p * t + 0.009383536875247955f;
  p = p * t + 0.048836808651685715f;
  p = p * t + 0.108759805560112f;
  p = p * t + 1.0905077457427979f;
  Float q = reciprocal(p);
  q *= q;
  q *= q;
  q *= q;
  return maximum(x, Float{}) - t * q;
}

// Erf-GELU to 2e-4, for results that are rounded to bf16: max(x, 0) - t Phi(-t) with t = min(|x|, 4), and Phi(t) - 1/2
// as an odd polynomial whose error in the result is least.
inline Float gelu_for_bf16(Float x) {
  const Float t = minimum(splat(4.0f), absolute(x)), u = t * t;
  Float p = splat(2.2473653160659524e-08f);
  p = p * u - 1.5830187294341158e-06f;
  p = p * u + 4.76497552881483e-05f;
  p = p * u - 0.0008110962808132172f;
  p = p * u + 0.008758487179875374f;
  p = p * u - 0.06454320251941681f;
  p = p * u + 0.39786240458488464f;
  return maximum(x, Float{}) + t * (p * t - 0.5f);
}

}  // namespace
}  // namespace minilm_fast
