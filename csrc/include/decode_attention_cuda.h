#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_dtype.h"

namespace minilm_fast::cuda {

// Longest history, and most rows that one block takes of an example.
constexpr int kMostHistory = 32767;
constexpr int kGroupRows = 16;

// One decoding step of one layer, see minilm_fast/ops/decode_attention.py. Strides are in elements; last dimensions
// are contiguous, the caches, the integers and the result wholly so. All pointers to numbers are aligned to 16 bytes
// and so are the rows of q, k and v. One dtype for everything but the bias.
struct DecodeAttention {
  Dtype dtype;
  const void *q, *k, *v;  // rows ordered (example, beam, row)
  void* out;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  const void *source_k, *source_v;  // [slots, heads, size, source_capacity], [slots, heads, source_capacity, size]
  const int32_t* source_lengths;    // [slots]
  void *history_k, *history_v;      // [slots, history_capacity, beams, heads, size]
  const int32_t* ancestry;          // [examples, beams, history_capacity]
  const int32_t *slots, *steps;     // [examples]
  const float* relative_bias;       // [heads, 2 * distance_limit + 1] or null
  int32_t distance_limit;
  int32_t examples, beams, rows, heads, size;
  int32_t source_capacity, history_capacity;
  float scale;
  bool early;  // may start before the kernel before has ended, which must not write caches or integers
};

// Head sizes 32, 64 and 128; cudaErrorInvalidValue for others.
cudaError_t launch_decode_attention(const DecodeAttention& problem, cudaStream_t stream);

// The source part of a packed batch to the caches of the above.
struct StoreSource {
  int32_t element_bytes;  // 2 or 4
  const void *k, *v;
  int64_t k_token, k_head, v_token, v_head;
  const int32_t *cu_seqlens, *source_counts, *slots;
  void *source_k, *source_v;
  int32_t* source_lengths;
  int32_t batch, heads, size, source_capacity;
};

cudaError_t launch_store_source(const StoreSource& problem, cudaStream_t stream);

}  // namespace minilm_fast::cuda
