#pragma once

#include <cstdint>

#include "isa.h"

// Passes over one row of a block of logits. The row is readable, and holds -infinity, up to a multiple of 16.
namespace minilm_fast::lm_head {

struct Kernels {
  // The largest element; NaNs are passed over.
  float (*maximum)(const float* logits, int64_t count);
  // sum of exp(logit - shift), where no logit is above shift; NaN if one is NaN.
  float (*sum_exp)(const float* logits, int64_t count, float shift);
  // Writes the indices of the elements above the threshold, ascending, and returns how many they are.
  int64_t (*above)(const float* logits, int64_t count, float threshold, int32_t* indices);
};

const Kernels& kernels(Isa isa);

extern const Kernels kDefault;
#ifdef MINILM_FAST_X86
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace minilm_fast::lm_head
