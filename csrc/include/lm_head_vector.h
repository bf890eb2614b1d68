#pragma once

#include "lm_head.h"
#include "vector.h"

// The passes in portable vector code, for whatever width the including file is compiled for.
namespace minilm_fast::lm_head {
namespace {

float maximum(const float* logits, int64_t count) {
  Float best = splat(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kWidth) {
    best = minilm_fast::maximum(load(logits + i), best);
  }
  return largest_lane(best);
}

float sum_exp(const float* logits, int64_t count, float shift) {
  Float sum = {};
  for (int64_t i = 0; i < count; i += kWidth) sum += exp_negative(load(logits + i) - shift);
  return sum_lanes(sum);
}

int64_t above(const float* logits, int64_t count, float threshold, int32_t* indices) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kWidth)
    for (uint32_t lanes = greater_lanes(load(logits + i), splat(threshold)); lanes; lanes &= lanes - 1)
      indices[found++] = static_cast<int32_t>(i + __builtin_ctz(lanes));
  return found;
}

}  // namespace
}  // namespace minilm_fast::lm_head
