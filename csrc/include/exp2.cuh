#pragma once

#include "cuda_device.cuh"

namespace minilm_fast::cuda {

// 2^x on the units of multiplication and addition, 2.7e-6 off at most (relative); exponents are cut off at -126 and
// 127, so what is smaller or larger stays near these. The polynomial has the least largest relative error on [-1/2,
// 1/2].
__device__ inline float exp2_polynomial(float x) {
  // 1.5 * 2^23: what is added to it is rounded to an integer, which stands in its lowest bits.
  constexpr float kRounding = 12582912.0f;
  const float bounded = fminf(fmaxf(x, -126.0f), 127.0f);
  const float rounded = bounded + kRounding;
  const float rest = bounded - (rounded - kRounding);
  float y = fmaf(rest, 0.009570102207362652f, 0.05591785907745361f);
  y = fmaf(y, rest, 0.240247443318367f);
  y = fmaf(y, rest, 0.6931217908859253f);
  y = fmaf(y, rest, 0.9999992847442627f);
  return __uint_as_float(__float_as_uint(y) + (__float_as_uint(rounded) << 23));
}

// 2^x of element `index` of a thread's scores: of each `kEvery` one goes to the polynomial (0: none), the others to the
// special-function unit.
template <int kEvery>
__device__ inline float exp2_shared_out(float x, int index) {
  if constexpr (kEvery > 0) {
    if (index % kEvery == kEvery - 1) return exp2_polynomial(x);
  }
  return exp2_approximate(x);
}

}  // namespace minilm_fast::cuda
