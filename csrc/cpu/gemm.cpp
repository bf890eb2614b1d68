#include "gemm.h"

#include "gemm_int8.h"
#include "gemm_vector.h"

namespace minilm_fast::gemm {

const Kernels kDefaultFp32 = {4, 1, 1, true, pack_rows_fp32, multiply<Fp32>};
const Kernels kDefaultBf16 = {4, 32, 1, false, pack_rows_bf16_as_fp32, multiply<Bf16>};
const Kernels kDefaultInt8 = {2, 64, 1, false, pack_rows_int16, multiply_int8};

#ifdef MINILM_FAST_X86
// In the order of Isa.
constexpr const Kernels* kFp32[] = {&kDefaultFp32, &kAvx2Fp32, &kAvx512Fp32, &kAvx512Fp32, &kAvx512Fp32, &kAmxFp32};
constexpr const Kernels* kBf16[] = {&kDefaultBf16, &kAvx2Bf16, &kAvx512Bf16, &kAvx512Bf16, &kDotBf16, &kAmxBf16};
constexpr const Kernels* kInt8[] = {&kDefaultInt8, &kAvx2Int8, &kAvx512Int8, &kVnniInt8, &kVnniInt8, &kAmxInt8};
#else
constexpr const Kernels* kFp32[] = {&kDefaultFp32};
constexpr const Kernels* kBf16[] = {&kDefaultBf16};
constexpr const Kernels* kInt8[] = {&kDefaultInt8};
#endif

const Kernels& kernels(Isa isa, Format format) {
  const auto& of_format = format == Format::kFp32 ? kFp32 : format == Format::kBf16 ? kBf16 : kInt8;
  return *of_format[static_cast<int>(isa)];
}

}  // namespace minilm_fast::gemm
