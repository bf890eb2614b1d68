#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace minilm_fast {

// Rows of [heads, size]: views of one tensor, but for queries of their own.
struct Projection {
  at::Tensor q, k, v;
};

inline int64_t projection_parts(const std::optional<at::Tensor>& queries) { return queries.has_value() ? 2 : 3; }

// Splits [tokens, 3, heads, size], or [tokens, 2, heads, size] where the queries are apart.
inline Projection split_projection(const at::Tensor& projection, const std::optional<at::Tensor>& queries) {
  const int64_t parts = projection_parts(queries);
  return {queries.has_value() ? *queries : projection.select(1, 0), projection.select(1, parts - 2),
          projection.select(1, parts - 1)};
}

}  // namespace minilm_fast
