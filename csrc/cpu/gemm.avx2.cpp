#include "gemm_int8.h"
#include "gemm_vector.h"

namespace minilm_fast::gemm {

const Kernels kAvx2Fp32 = {4, 1, 1, true, pack_rows_fp32, multiply<Fp32>};
const Kernels kAvx2Bf16 = {4, 32, 1, false, pack_rows_bf16_as_fp32, multiply<Bf16>};
const Kernels kAvx2Int8 = {2, 64, 1, false, pack_rows_int16, multiply_int8};

}  // namespace minilm_fast::gemm
