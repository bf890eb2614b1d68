#include "norm_kernel.h"

namespace minilm_fast {

NormKernels norm_kernels_default() { return {add_layer_norm, embed_layer_norm, bias_gelu}; }

}  // namespace minilm_fast
