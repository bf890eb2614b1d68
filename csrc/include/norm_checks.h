#pragma once

#include <algorithm>

#include "checks.h"

namespace minilm_fast {

// How many rows of `channels` are worth a thread.
inline int64_t grain(int64_t channels) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, channels)); }

// A matrix whose rows are contiguous.
inline void check_matrix(const char* op, const char* name, const at::Tensor& x) {
  check_float(op, name, x);
  TORCH_CHECK(x.dim() == 2, op, ": ", name, " must be [rows, channels], got ", x.sizes());
  check_rows_contiguous(op, name, x);
}

}  // namespace minilm_fast
