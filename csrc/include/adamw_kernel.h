#pragma once

// The kernel behind adamw_<isa>, compiled once for each instruction set.

#include "adamw.h"
#include "vec.h"

namespace minilm_fast {
namespace {

inline Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline void adamw(const AdamWProblem& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const Vec grad = load_first(p.grad + i, n);
    Vec mean = load_first(p.mean + i, n), square = load_first(p.square + i, n);
    mean += (grad - mean) * p.rest1;
    square = square * p.beta2 + grad * grad * p.rest2;
    const Vec step = mean / (square_root(square) + p.eps) * p.step_size;
    store_first(p.param + i, (load_first(p.param + i, n) - step) * p.decay, n);
    store_first(p.mean + i, mean, n);
    store_first(p.square + i, square, n);
  }
}

}  // namespace
}  // namespace minilm_fast
