#include "decode_attention_kernel.h"

namespace minilm_fast {

DecodeKernels decode_kernels_default() { return {kTileRows, decode_scratch, attend}; }

StoreKernel store_kernel_default() { return store_source; }

}  // namespace minilm_fast
