#include "relation_kl_kernel.h"

namespace minilm_fast {

const RelationKernels relation_kl_avx512 = {relation_kl_forward, relation_kl_backward};

}  // namespace minilm_fast
