#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_dtype.h"

namespace minilm_fast::cuda {

constexpr int kStepChunk = 8;        // rows of numbers are whole chunks of so many
constexpr int kMostStepNorm = 1024;  // numbers of a row that is normalised, at most

// A linear layer over few rows, see minilm_fast/ops/step.py. Strides are in elements; but for the rows of `x` and
// `residual`, everything is contiguous; pointers and rows are aligned to 16 bytes. `dtype` is half or bfloat16.
struct StepLinear {
  Dtype dtype;    // of weight, residual, normal, x without a norm, and out unless it is fp32
  const void* x;  // [rows, features], fp32 if there is a norm
  int64_t x_row;
  const void* weight;    // [outputs, features]
  const float* bias;     // [outputs] or null
  const void* residual;  // [rows, outputs] or null
  int64_t residual_row;
  const float *norm_weight, *norm_bias;  // [features], or both null
  float eps;
  void* normal;  // [rows, features] if there is a norm
  void* out;     // [rows, outputs]
  bool out_float, gelu;
  bool early;  // may start before the kernel before has ended, which must not write the weight
  int32_t rows, outputs, features;
};

cudaError_t launch_step_linear(const StepLinear& problem, cudaStream_t stream);

// The norm of rows alone: fp32 `x` [rows, channels] to `out` of `dtype`.
struct StepNorm {
  Dtype dtype;
  const float* x;
  int64_t x_row;
  const float *weight, *bias;
  float eps;
  void* out;
  bool early;
  int32_t rows, channels;
};

cudaError_t launch_step_norm(const StepNorm& problem, cudaStream_t stream);

// The embeddings of a step's rows, ordered (example, beam, row): `rows` is 1, or 2 with `mask_id` in the second.
struct StepEmbedding {
  Dtype dtype;
  const int32_t* last_ids;        // [examples, beams]
  const int32_t *slots, *steps;   // [examples]
  const int32_t* source_lengths;  // [slots]
  const float *word, *position;   // [words, channels], [positions, channels]
  const float* type;              // [channels], the row of the one token type, or null
  const float *weight, *bias;     // [channels]
  float eps;
  void* out;  // [examples * beams * rows, channels]
  int32_t examples, beams, rows, mask_id, words, positions, channels;
};

cudaError_t launch_step_embedding(const StepEmbedding& problem, cudaStream_t stream);

}  // namespace minilm_fast::cuda
