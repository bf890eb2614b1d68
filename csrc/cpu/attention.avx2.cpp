#include "attention_backward_kernel.h"

namespace minilm_fast {

void attention_avx2(const AttentionProblem& problem, const AttentionTask& task, float* scratch) {
  attention_kernel(problem, task, scratch);
}

void attention_backward_avx2(const AttentionProblem& problem, const AttentionGradients& gradients,
                             const AttentionTask& task, float* bias_gradient, float* scratch) {
  attention_backward_kernel(problem, gradients, task, bias_gradient, scratch);
}

}  // namespace minilm_fast
