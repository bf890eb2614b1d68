#pragma once

#include "gemm.h"

// The kernels that each instruction set's file defines.
namespace minilm_fast::gemm {

extern const Kernels kDefaultFp32, kDefaultBf16, kDefaultInt8;
#ifdef MINILM_FAST_X86
extern const Kernels kAvx2Fp32, kAvx2Bf16, kAvx2Int8;
extern const Kernels kAvx512Fp32, kAvx512Bf16, kAvx512Int8;
extern const Kernels kVnniInt8, kDotBf16;
extern const Kernels kAmxFp32, kAmxBf16, kAmxInt8;
#endif

}  // namespace minilm_fast::gemm
