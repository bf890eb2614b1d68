#pragma once

#include <cstdint>

namespace minilm_fast {

// LayerNorm of rows of `channels`; strides in elements, output contiguous.
struct NormProblem {
  const void* x;
  const void* residual;  // or null
  void* out;             // in the type of x
  bool x_bf16, residual_bf16;
  int64_t x_stride, residual_stride, channels;
  const float *weight, *bias;
  float eps;
};

struct EmbedProblem {
  const int32_t *ids, *positions, *types;  // types may be null
  const float *word, *position, *type;     // tables [rows, channels]
  float* out;
  int64_t channels;
  const float *weight, *bias;
  float eps;
};

struct GeluProblem {
  const void* x;
  const float* bias;  // or null
  void* out;
  bool bf16;
  int64_t x_stride, channels;
};

struct NormKernels {
  void (*add_layer_norm)(const NormProblem&, int64_t begin, int64_t end);
  void (*embed_layer_norm)(const EmbedProblem&, int64_t begin, int64_t end);
  void (*bias_gelu)(const GeluProblem&, int64_t begin, int64_t end);
};

NormKernels norm_kernels_default();
NormKernels norm_kernels_avx2();
NormKernels norm_kernels_avx512();

}  // namespace minilm_fast
