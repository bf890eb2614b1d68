#include "decode_attention_kernel.h"

namespace minilm_fast {

DecodeKernels decode_kernels_avx2() { return {kTileRows, attend, store_source}; }

}  // namespace minilm_fast
