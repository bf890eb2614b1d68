#pragma once

namespace minilm_fast::cuda {

// What the CUDA kernels read and write; sums are fp32 for all.
enum class Dtype { kFloat, kHalf, kBFloat16 };

}  // namespace minilm_fast::cuda
