#pragma once

#include "decode_attention.h"
#include "isa.h"

namespace minilm_fast {

inline DecodeKernels decode_kernels() {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAvx512) return decode_kernels_avx512();
  if (current_isa() >= Isa::kAvx2) return decode_kernels_avx2();
#endif
  return decode_kernels_default();
}

}  // namespace minilm_fast
