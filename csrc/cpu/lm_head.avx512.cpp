#include "lm_head_vector.h"

namespace minilm_fast::lm_head {

const Kernels kAvx512 = {maximum, sum_exp, above};

}  // namespace minilm_fast::lm_head
