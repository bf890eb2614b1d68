#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_dtype.h"
#include "dropout.h"

namespace minilm_fast::cuda {

// The forward pass of attention over packed sequences, see minilm_fast/ops/attention.py. Strides are in elements; last
// dimensions are contiguous, the integers, the bias and the results wholly so. Rows of q, k and v start at multiples of
// 16 bytes.
struct Attention {
  Dtype dtype;  // fp16 or bf16
  const void *q, *k, *v;
  void* out;   // [queries, heads, size]
  float* lse;  // [heads, queries]; the backward pass only reads it
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  const int32_t* cu_seqlens;    // [batch + 1]
  const int32_t* segments;      // [batch, 3]
  const int32_t* cu_queries;    // [batch + 1] or null: all rows ask
  const float* relative_bias;   // [heads, 2 * distance_limit + 1] or null
  const int32_t* position_ids;  // [tokens] or null, as the bias
  int32_t distance_limit;
  int32_t batch, heads, size, max_seqlen;
  int64_t queries;
  float scale;
  Dropout dropout;
};

// The backward pass: gradients of q, k and v. Rows of grad_out and out start at multiples of 16 bytes as well; the
// heads of a gradient's row lie one behind the other.
struct AttentionGradients {
  Attention forward;  // its arguments and what it left; it writes no results here
  const void *grad_out, *out;
  int64_t grad_token, grad_head, out_token, out_head;
  void *dq, *dk, *dv;
  int64_t dq_token, dk_token, dv_token;
  float* statistics;  // [2, heads, queries]: room for what the kernel of rows leaves to that of columns
  // Null, or the gradient of the relative bias in fixed point, zeros before: [heads, 2 * distance_limit + 1].
  int64_t* bias_sums;
  const float* bias_units;  // how many units are 1, a power of two, and the largest norm of a row of v
};

// Up to this distance there is a gradient of the relative bias.
constexpr int kMostBiasDistance = 1024;
// Its unit is no more than the largest possible gradient of a score over so many: numbers of a row add up to about
// this.
constexpr float kBiasUnits = 1099511627776.0f;  // 2^40

// Head sizes 32, 64 and 128; cudaErrorInvalidValue for others and for fp32.
cudaError_t launch_attention(const Attention& problem, cudaStream_t stream);
cudaError_t launch_attention_backward(const AttentionGradients& problem, cudaStream_t stream);

}  // namespace minilm_fast::cuda
