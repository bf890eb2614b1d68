#pragma once

#include "decode_attention.h"
#include "isa.h"

namespace minilm_fast {

inline DecodeKernels decode_kernels(const DecodeProblem& problem) {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAmx && fits_tiles(problem)) return decode_kernels_amx();
  if (current_isa() >= Isa::kAvx512) return decode_kernels_avx512();
  if (current_isa() >= Isa::kAvx2) return decode_kernels_avx2();
#endif
  return decode_kernels_default();
}

inline StoreKernel store_kernel() {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAvx512) return store_kernel_avx512();
  if (current_isa() >= Isa::kAvx2) return store_kernel_avx2();
#endif
  return store_kernel_default();
}

}  // namespace minilm_fast
