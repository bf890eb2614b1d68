#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "attention_cuda.h"

namespace minilm_fast::cuda {

template <template <typename, int, bool, bool> class Launch, typename T, int kSize, typename Problem>
cudaError_t launch_attention_size(const Attention& p, const Problem& problem, cudaStream_t stream) {
  const bool bias = p.relative_bias != nullptr;
  if (p.dropout.threshold > 0)
    return bias ? Launch<T, kSize, true, true>::run(problem, stream)
                : Launch<T, kSize, false, true>::run(problem, stream);
  return bias ? Launch<T, kSize, true, false>::run(problem, stream)
              : Launch<T, kSize, false, false>::run(problem, stream);
}

template <template <typename, int, bool, bool> class Launch, typename T, typename Problem>
cudaError_t launch_attention_type(const Attention& p, const Problem& problem, cudaStream_t stream) {
  switch (p.size) {
    case 32:
      return launch_attention_size<Launch, T, 32>(p, problem, stream);
    case 64:
      return launch_attention_size<Launch, T, 64>(p, problem, stream);
    case 128:
      return launch_attention_size<Launch, T, 128>(p, problem, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// Runs the instance (type, head size, bias, dropout) that a problem's forward pass asks for.
template <template <typename, int, bool, bool> class Launch, typename Problem>
cudaError_t launch_attention_instance(const Attention& p, const Problem& problem, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kHalf:
      return launch_attention_type<Launch, __half>(p, problem, stream);
    case Dtype::kBFloat16:
      return launch_attention_type<Launch, __nv_bfloat16>(p, problem, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace minilm_fast::cuda
