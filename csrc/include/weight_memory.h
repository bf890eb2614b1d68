#pragma once

#include <ATen/core/Tensor.h>

namespace minilm_fast {

// Memory for a packed weight, uint8 [bytes], aligned to 64 bytes. Weights lie side by side on huge pages where the
// system has them: a short batch reads each once, and on pages of 4 KB it would wait for their addresses.
at::Tensor weight_memory(int64_t bytes);

}  // namespace minilm_fast
