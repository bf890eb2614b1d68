#include "gemm_int8.h"
#include "gemm_vector.h"

namespace minilm_fast::gemm {

const Kernels kAvx2Fp32 = {4, 1, pack_rows_fp32, multiply<Fp32>};
const Kernels kAvx2Bf16 = {4, 1, pack_rows_bf16_as_fp32, multiply<Bf16>};
const Kernels kAvx2Int8 = {2, 1, pack_rows_int16, multiply_int8};

}  // namespace minilm_fast::gemm
