#pragma once

// What the packed attention's forward and backward operators share: checks of their operands, the problem, the tasks.

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "projection.h"

namespace minilm_fast {

struct AttentionOperands {
  const at::Tensor &q, &k, &v, &cu_seqlens, &segments;
  const std::optional<at::Tensor>& cu_queries;
  int64_t max_seqlen;
  double scale;
  const std::optional<at::Tensor>&relative_bias, &position_ids;
  double dropout;
  const std::optional<at::Tensor>& seed;
};

inline Projection checked_projection(const char* op, const at::Tensor& projection,
                                     const std::optional<at::Tensor>& queries) {
  check_shape(op, "projection", projection, {-1, projection_parts(queries), -1, -1});
  return split_projection(projection, queries);
}

inline void check_rows(const char* op, const char* name, const at::Tensor& x, const at::Tensor& q, int64_t rows) {
  check_dtype(op, name, x, {q.scalar_type()});
  check_shape(op, name, x, {rows, q.size(1), q.size(2)});
  check_rows_contiguous(op, name, x);
}

inline void check_queries(const char* op, const at::Tensor& cu_queries, const at::Tensor& cu_seqlens, int64_t rows) {
  const int64_t batch = cu_seqlens.size(0) - 1;
  const int32_t* queries = check_ints(op, "cu_queries", cu_queries, {batch + 1});
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  TORCH_CHECK(queries[0] == 0 && queries[batch] == rows, op, ": cu_queries must go from 0 to the ", rows,
              " rows of q, got ", queries[0], " to ", queries[batch]);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t count = int64_t{queries[i + 1]} - queries[i], length = int64_t{starts[i + 1]} - starts[i];
    TORCH_CHECK(count >= 0 && count <= length, op, ": cu_queries says that ", count, " rows of sequence ", i,
                " ask, which has ", length);
  }
}

// Checks the operands; gives the problem, without outputs, and the length of the longest sequence.
inline AttentionProblem make_problem(const char* op, const AttentionOperands& o, int64_t& longest) {
  const at::Tensor &q = o.q, &k = o.k, &v = o.v;
  check_float(op, "q", q);
  check_head_size(op, q);
  TORCH_CHECK(k.dim() == 3, op, ": k must have the shape [tokens, heads, head_dim], got ", k.sizes());
  const int64_t tokens = o.cu_queries.has_value() ? k.size(0) : q.size(0);
  check_rows(op, "q", q, q, q.size(0));
  check_rows(op, "k", k, q, tokens);
  check_rows(op, "v", v, q, tokens);
  longest = check_layout(op, o.cu_seqlens, o.segments, o.max_seqlen, tokens, "k");
  if (o.cu_queries.has_value()) check_queries(op, *o.cu_queries, o.cu_seqlens, q.size(0));
  TORCH_CHECK(o.relative_bias.has_value() == o.position_ids.has_value(), op,
              ": relative_bias and position_ids go together");
  AttentionProblem problem{};
  problem.q = q.const_data_ptr();
  problem.k = k.const_data_ptr();
  problem.v = v.const_data_ptr();
  problem.bf16 = q.scalar_type() == at::kBFloat16;
  problem.tokens = tokens;
  problem.queries = q.size(0);
  problem.heads = q.size(1);
  problem.size = q.size(2);
  problem.q_token = q.stride(0);
  problem.q_head = q.stride(1);
  problem.k_token = k.stride(0);
  problem.k_head = k.stride(1);
  problem.v_token = v.stride(0);
  problem.v_head = v.stride(1);
  problem.scale = o.scale;
  problem.dropout = o.dropout;
  problem.seed = check_seed(op, o.dropout, o.seed);
  if (o.relative_bias.has_value()) {
    problem.distance_limit = check_relative_bias(op, *o.relative_bias, problem.heads);
    problem.relative_bias = o.relative_bias->const_data_ptr<float>();
    problem.positions = check_ints(op, "position_ids", *o.position_ids, {tokens});
  }
  return problem;
}

// One task for each head of each sequence, of all the rows that ask, maybe none; the heads of a sequence follow one
// another.
inline std::vector<AttentionTask> make_tasks(const AttentionOperands& operands) {
  const int64_t batch = operands.segments.size(0), heads = operands.q.size(1);
  const int32_t* starts = operands.cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* counts = operands.segments.const_data_ptr<int32_t>();
  const int32_t* queries = operands.cu_queries.has_value() ? operands.cu_queries->const_data_ptr<int32_t>() : starts;
  std::vector<AttentionTask> tasks;
  tasks.reserve(batch * heads);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t length = int64_t{starts[i + 1]} - starts[i], silent = length - (queries[i + 1] - queries[i]);
    for (int64_t head = 0; head < heads; ++head)
      tasks.push_back(
          {starts[i], queries[i] - silent, counts[3 * i], counts[3 * i + 1], counts[3 * i + 2], head, silent, length});
  }
  return tasks;
}

}  // namespace minilm_fast
