#include "attention_kernel.h"

namespace minilm_fast {

void attention_avx512(const AttentionProblem& problem, const AttentionTask& task, float* scratch) {
  attention_kernel(problem, task, scratch);
}

}  // namespace minilm_fast
