#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "vector.h"

namespace minilm_fast {
namespace {

// 1 / x, to an ulp or two, for normal x.
inline Float reciprocal(Float x) {
#ifdef __AVX512F__
  const Float r = reinterpret_cast<Float>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// Erf-GELU, x Phi(x), to 5e-7 and in the tails to 3e-7. With t = |x| it is max(x, 0) - t Phi(-t), and
// (2 Phi(-t))^(-1/8) is so nearly a polynomial that degree 8, fitted on [0, 6] for the least error of the result,
// suffices; beyond, it grows faster than it need, and the eighth power of its reciprocal vanishes.
inline Float gelu(Float x) {
  Float t = absolute(x);
  t = t > 40.0f ? splat(40.0f) : t;
  Float p = splat(2.8756680876540486e-06f);
  p = p * t - 1.6006581063265912e-05f;
  p = p * t + 9.369227336719632e-05f;
  p = p * t + 0.00012193989095976576f;
  p = p * t + 0.000964698672760278f;
  p = p * t + 0.008604741655290127f;
  p = p * t + 0.04478355124592781f;
  p = p * t + 0.09973318129777908f;
  p = p * t + 1.0f;
  Float q = reciprocal(p);
  q *= q;
  q *= q;
  q *= q;
  const Float positive = x > 0.0f ? x : Float{};
  return positive - t * 0.5f * q;
}

}  // namespace
}  // namespace minilm_fast
