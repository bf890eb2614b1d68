#include "loss_kernel.h"

namespace minilm_fast::loss {

const Kernels kDefault = {reduce, gradient, transpose, pack};

const Kernels& kernels(Isa isa) {
#ifdef MINILM_FAST_X86
  if (isa >= Isa::kAvx512) return kAvx512;
  if (isa == Isa::kAvx2) return kAvx2;
#endif
  return kDefault;
}

}  // namespace minilm_fast::loss
