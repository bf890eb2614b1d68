#pragma once

#include <cstdint>

namespace minilm_fast {

// One AdamW update of consecutive elements, see minilm_fast/ops/adamw.py.
struct AdamWProblem {
  float *param, *mean, *square;
  const float* grad;
  float step_size, beta2, eps, decay;
  float rest1, rest2;  // 1 - beta1 and 1 - beta2, which lose digits in fp32
};

using AdamWKernel = void (*)(const AdamWProblem&, int64_t begin, int64_t end);
void adamw_default(const AdamWProblem&, int64_t begin, int64_t end);
void adamw_avx2(const AdamWProblem&, int64_t begin, int64_t end);
void adamw_avx512(const AdamWProblem&, int64_t begin, int64_t end);

}  // namespace minilm_fast
