#include "lm_head.h"

#include "lm_head_vector.h"

namespace minilm_fast::lm_head {

const Kernels kDefault = {maximum, sum_exp, above};

const Kernels& kernels(Isa isa) {
#ifdef MINILM_FAST_X86
  if (isa >= Isa::kAvx512) return kAvx512;
  if (isa == Isa::kAvx2) return kAvx2;
#endif
  return kDefault;
}

}  // namespace minilm_fast::lm_head
