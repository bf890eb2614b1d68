#include "gemm.h"

#include "gemm_int8.h"
#include "gemm_vector.h"

namespace minilm_fast::gemm {

const Kernels kDefaultFp32 = {4, 1, pack_rows_fp32, multiply<Fp32>};
const Kernels kDefaultBf16 = {4, 1, pack_rows_bf16_as_fp32, multiply<Bf16>};
const Kernels kDefaultInt8 = {2, 1, pack_rows_int16, multiply_int8};

const Kernels& kernels(Isa isa, Format format) {
  static constexpr const Kernels* kTable[][kFormats] = {
      {&kDefaultFp32, &kDefaultBf16, &kDefaultInt8},
#ifdef MINILM_FAST_X86
      {&kAvx2Fp32, &kAvx2Bf16, &kAvx2Int8},          {&kAvx512Fp32, &kAvx512Bf16, &kAvx512Int8},
      {&kAvx512Fp32, &kVnniBf16, &kVnniInt8},        {&kAvx512Fp32, &kAmxBf16, &kAmxInt8},
#endif
  };
  return *kTable[static_cast<int>(isa)][static_cast<int>(format)];
}

}  // namespace minilm_fast::gemm
