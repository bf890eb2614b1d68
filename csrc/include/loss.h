#pragma once

#include <cstdint>

#include "gemm.h"
#include "isa.h"

// Passes over a block of logits, the transpose of the usual: a row for each word, a column for each row of the batch.
namespace minilm_fast::loss {

// Columns of a block come in multiples of this, and so do the logits' rows' ends: what is beyond may be overwritten.
constexpr int64_t kColumnMultiple = 32;

struct Block {
  float* logits;
  int64_t words, columns, stride;
  const float* bias;  // of each word, not yet added to the logits
};

// A matrix [k, features] whose last dimension is contiguous.
struct Source {
  const void* data;
  bool bf16;
  int64_t stride, k, features;
};

struct Kernels {
  // Of each column: the largest logit, the sum of exp(logit - largest), and the sum of the logits.
  void (*reduce)(const Block&, float* largest, float* exponentials, float* totals);
  // Turns the logits into scale[column] * (exp(logit - lse[column]) - share), and gives the sum of each word's row.
  void (*gradient)(const Block&, const float* lse, const float* scale, float share, float* row_sums);
  // Writes the transpose: a row of `words` for each column, to a multiple of kColumnMultiple words beyond.
  void (*transpose)(const Block&, void* out, bool bf16, int64_t out_stride);
  // Writes rows of k to the panels of a packed weight (gemm.h), zeros for the k from source.k to `padded_k` and for the
  // features that complete the last panel; a panel starts `panel_bytes` after the one before.
  void (*pack)(const Source&, gemm::Format, int64_t padded_k, char* panels, int64_t panel_bytes);
};

const Kernels& kernels(Isa isa);

extern const Kernels kDefault;
#ifdef MINILM_FAST_X86
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace minilm_fast::loss
