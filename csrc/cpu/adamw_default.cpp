#include "adamw_kernel.h"

namespace minilm_fast {

void adamw_default(const AdamWProblem& problem, int64_t begin, int64_t end) { adamw(problem, begin, end); }

}  // namespace minilm_fast
