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

// dropout(x + x_bias) + residual, the dropout of minilm_fast/ops/dropout.py.
struct DropoutSum {
  const void* x;
  const void* residual;  // or null
  const float* x_bias;   // or null
  bool x_bf16, residual_bf16;
  int64_t x_stride, residual_stride, channels;
  double dropout;
  uint64_t seed;
};

struct DropoutNormProblem {
  DropoutSum sum;
  void* out;  // in the type of x
  const float *weight, *bias;
  float eps;
  float *mean, *rstd;  // of each row
};

struct DropoutNormGradient {
  DropoutSum sum;
  const void* grad;  // contiguous, in the type of x
  const float *weight, *mean, *rstd;
  void* x_grad;         // in the type of x, or null
  void* residual_grad;  // in the type of residual, or null
};

struct GeluGradient {
  const void* grad;  // contiguous, in the type of x
  const void* x;
  const float* bias;  // or null
  void* x_grad;
  bool bf16;
  int64_t x_stride, channels;
};

// What the sums of a block of rows and the row buffers of the kernels are padded to, in floats.
constexpr int64_t kSumMultiple = 16;
constexpr int64_t kRowMultiple = 128;

struct NormKernels {
  void (*add_layer_norm)(const NormProblem&, int64_t begin, int64_t end);
  void (*embed_layer_norm)(const EmbedProblem&, int64_t begin, int64_t end);
  void (*bias_gelu)(const GeluProblem&, int64_t begin, int64_t end);
  // `rows` has room for two padded rows.
  void (*dropout_norm)(const DropoutNormProblem&, int64_t begin, int64_t end, float* rows);
  // Adds to `sums` the gradients of the weight, the bias and x_bias, each padded.
  void (*dropout_norm_backward)(const DropoutNormGradient&, int64_t begin, int64_t end, float* rows, float* sums);
  // Adds to `sums` the gradient of the bias.
  void (*bias_gelu_backward)(const GeluGradient&, int64_t begin, int64_t end, float* sums);
};

// The kernels for the instruction set in use.
NormKernels norm_kernels();

NormKernels norm_kernels_default();
NormKernels norm_kernels_avx2();
NormKernels norm_kernels_avx512();

}  // namespace minilm_fast
