#pragma once

#include <cstdint>

namespace minilm_fast {

// One decoding step, see minilm_fast/ops/decode_attention.py. Strides are in elements; last dimensions are
// contiguous, the caches and the result wholly so.
struct DecodeProblem {
  const void *q, *k, *v;  // rows ordered (example, beam, row)
  void* out;
  bool bf16;  // storage of q, k, v and out; otherwise fp32
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  const void *source_k, *source_v;
  void *history_k, *history_v;
  bool cache_bf16;
  int64_t heads, size, beams, rows;
  int64_t source_capacity, history_capacity;
  double scale;
  const float* relative_bias;  // [heads, 2 * distance_limit + 1] or null
  int64_t distance_limit;
};

// A key beyond the source that some hypothesis of a group sees: of the history at (step, beam), or where `row` is
// not negative, the one that this row of this beam brings along.
struct TailEntry {
  int32_t step, beam, row;
};

// Some beams of one example, few enough for their rows to fill one tile. All heads share it.
struct DecodeGroup {
  int64_t example, slot, length, step;
  int64_t beam_begin, beam_end;
  const TailEntry* tail;
  int64_t tail_count;
  const int32_t* tail_positions;  // counted from the end of the source
  const float* tail_mask;         // [group's rows, tail_stride]: 0 where the row sees the entry, else -infinity
  int64_t tail_stride;            // tail_count rounded up to a multiple of 16
};

// Packed keys and values of one sequence to one slot of the caches.
struct StoreProblem {
  const void *k, *v;
  bool bf16;
  int64_t k_token, k_head, v_token, v_head;
  void *source_k, *source_v;
  bool cache_bf16;
  int64_t heads, size, source_capacity;
};

struct DecodeKernels {
  int tile_rows;  // the most rows of a group
  // Floats of scratch memory, aligned to 64 bytes, that `attend` needs for groups of up to `keys` keys.
  int64_t (*scratch)(const DecodeProblem&, int64_t keys);
  // Pairs (group, head), counted with the head running fastest: [begin, end) of `count` of them. In a row, because
  // while one is worked on the next one's source is fetched.
  void (*attend)(const DecodeProblem&, const DecodeGroup* groups, int64_t count, int64_t begin, int64_t end,
                 float* scratch);
};

using StoreKernel = void (*)(const StoreProblem&, int64_t first, int64_t count, int64_t slot, int64_t head);

DecodeKernels decode_kernels_default();
DecodeKernels decode_kernels_avx2();
DecodeKernels decode_kernels_avx512();
DecodeKernels decode_kernels_amx();  // only if fits_tiles

StoreKernel store_kernel_default();
StoreKernel store_kernel_avx2();
StoreKernel store_kernel_avx512();

// Whether the kernel on matrix tiles can do it.
static inline bool fits_tiles(const DecodeProblem& problem) {
  return problem.cache_bf16 && problem.size % 32 == 0 && problem.relative_bias == nullptr && problem.scale > 0;
}

}  // namespace minilm_fast
