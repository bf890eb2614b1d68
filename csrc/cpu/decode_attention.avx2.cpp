#include "decode_attention_kernel.h"

namespace minilm_fast {

DecodeKernels decode_kernels_avx2() { return {kTileRows, decode_scratch, attend}; }

StoreKernel store_kernel_avx2() { return store_source; }

}  // namespace minilm_fast
