#include "relation_kl_kernel.h"

namespace minilm_fast {

const RelationKernels relation_kl_default = {relation_kl_forward, relation_kl_backward};

}  // namespace minilm_fast
