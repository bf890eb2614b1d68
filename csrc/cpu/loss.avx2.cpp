#include "loss_kernel.h"

namespace minilm_fast::loss {

const Kernels kAvx2 = {reduce, gradient, transpose, pack};

}  // namespace minilm_fast::loss
