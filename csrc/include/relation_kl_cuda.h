#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_dtype.h"

namespace minilm_fast::cuda {

constexpr int kMostRelationSize = 128;

// One side of a relation: a and b `[tokens, heads, size]`. Strides are in elements; rows start at multiples of 16 bytes
// and have a multiple of 8 elements.
struct RelationOperands {
  const void *a, *b;
  int64_t a_token, a_head, b_token, b_head;
  int32_t size;
  float scale;  // of the scores, in powers of two
  double* lse;  // [heads, tokens], natural: written by the forward, read by the backward pass
};

// What a row's divergence counts: 1, 1 / (heads * tokens), or 1 / (heads * length * sequences that are not empty).
enum class RelationReduction { kSum, kTokenMean, kBatchMean };

// Which gradient a launch computes: that of a, of b, or, where b is a, their sum.
enum class RelationGradient { kOfA, kOfB, kOfBoth };

// The distillation loss of a relation over packed sequences, see minilm_fast/ops/relation_kl.py.
struct RelationKl {
  Dtype dtype;  // fp16 or bf16
  RelationOperands teacher, student;
  const int32_t* cu_seqlens;  // [batch + 1]
  const int32_t* segments;    // [batch, 3]
  int32_t batch, heads, max_seqlen;
  int64_t tokens;
  RelationReduction reduction;
  bool symmetric;      // a is b on both sides
  double* parts;       // forward: of the loss, one of each block: [batch, heads, relation_kl_blocks]
  const float* grad;   // backward: of the loss
  void* student_grad;  // [tokens, heads, student size], contiguous
};

// Blocks that share out the rows of a head of the longest sequence.
int64_t relation_kl_blocks(const RelationKl& problem);

// Head sizes 8 to 128, multiples of 8; cudaErrorInvalidValue for others and for fp32.
cudaError_t launch_relation_kl(const RelationKl& problem, cudaStream_t stream);
cudaError_t launch_relation_kl_backward(const RelationKl& problem, RelationGradient gradient, cudaStream_t stream);

}  // namespace minilm_fast::cuda
