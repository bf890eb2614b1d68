#include "decode_attention_kernel.h"

namespace minilm_fast {

DecodeKernels decode_kernels_avx512() { return {kTileRows, decode_scratch, attend}; }

StoreKernel store_kernel_avx512() { return store_source; }

}  // namespace minilm_fast
