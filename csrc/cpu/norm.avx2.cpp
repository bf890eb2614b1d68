#include "norm_kernel.h"
#include "norm_training_kernel.h"

namespace minilm_fast {

NormKernels norm_kernels_avx2() {
  return {add_layer_norm, embed_layer_norm, bias_gelu, dropout_norm, dropout_norm_backward, bias_gelu_backward};
}

}  // namespace minilm_fast
