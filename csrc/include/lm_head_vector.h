#pragma once

#include "lm_head.h"
#include "vector.h"

// The passes in portable vector code, for whatever width the including file is compiled for.
namespace minilm_fast::lm_head {
namespace {

inline float largest(Float x) {
  float best = x[0];
  for (int i = 1; i < kWidth; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

float maximum(const float* logits, int64_t count) {
  Float best = splat(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kWidth) {
    best = minilm_fast::maximum(load(logits + i), best);
  }
  return largest(best);
}

float sum_exp(const float* logits, int64_t count, float shift) {
  Float sum = {};
  for (int64_t i = 0; i < count; i += kWidth) sum += exp_negative(load(logits + i) - shift);
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) total += sum[i];
  return total;
}

int64_t above(const float* logits, int64_t count, float threshold, int32_t* indices) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    if (!any(load(logits + i) > threshold)) continue;
    for (int64_t j = i; j < i + kWidth; ++j)
      if (logits[j] > threshold) indices[found++] = static_cast<int32_t>(j);
  }
  return found;
}

}  // namespace
}  // namespace minilm_fast::lm_head
