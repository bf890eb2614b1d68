#include "attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "attention_operands.h"
#include "isa.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "attention";

// Where a task for each head of each sequence leaves threads idle, the rows are cut as well. A task that prepares the
// keys for few rows wastes work, hence the least size.
std::vector<AttentionTask> cut_tasks(const std::vector<AttentionTask>& whole, int64_t rows_of_all_heads) {
  constexpr int64_t kLeastRows = 120;
  const int64_t share = std::max(kLeastRows, rows_of_all_heads / (4 * int64_t{at::get_num_threads()}));
  std::vector<AttentionTask> tasks;
  for (const AttentionTask& task : whole) {
    const int64_t count = task.row_end - task.row_begin;
    const int64_t pieces = std::max<int64_t>(1, count / share), rows = (count + pieces - 1) / pieces;
    for (int64_t row = task.row_begin; row < task.row_end; row += rows) {
      tasks.push_back(task);
      tasks.back().row_begin = row;
      tasks.back().row_end = std::min(row + rows, task.row_end);
    }
  }
  return tasks;
}

}  // namespace

AttentionKernel attention_kernel(bool bf16) {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAmx && bf16) return attention_amx;
  if (current_isa() >= Isa::kAvx512) return attention_avx512;
  if (current_isa() >= Isa::kAvx2) return attention_avx2;
#endif
  return attention_default;
}

namespace {

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                             const std::optional<at::Tensor>& cu_queries, int64_t max_seqlen,
                                             double scale, const std::optional<at::Tensor>& relative_bias,
                                             const std::optional<at::Tensor>& position_ids, double dropout,
                                             const std::optional<at::Tensor>& seed) {
  const AttentionOperands operands{
      q, k, v, cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias, position_ids, dropout, seed};
  int64_t longest = 0;
  AttentionProblem problem = make_problem(kOp, operands, longest);
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  if (q.numel() == 0) return {out, lse};
  problem.out = out.data_ptr();
  problem.lse = lse.data_ptr<float>();

  const std::vector<AttentionTask> tasks = cut_tasks(make_tasks(operands), problem.queries * problem.heads);
  const AttentionKernel kernel = attention_kernel(problem.bf16);
  const size_t bytes = sizeof(float) * static_cast<size_t>(attention_scratch(problem, longest));
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    kernel(problem, tasks[i], reinterpret_cast<float*>(scratch.get(bytes)));
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> projected_attention(const at::Tensor& projection,
                                                       const std::optional<at::Tensor>& queries,
                                                       const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                                       const std::optional<at::Tensor>& cu_queries, int64_t max_seqlen,
                                                       double scale, const std::optional<at::Tensor>& relative_bias,
                                                       const std::optional<at::Tensor>& position_ids, double dropout,
                                                       const std::optional<at::Tensor>& seed) {
  const Projection parts = checked_projection("projected_attention", projection, queries);
  return attention(parts.q, parts.k, parts.v, cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias,
                   position_ids, dropout, seed);
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("attention", &minilm_fast::attention);
  m.impl("projected_attention", &minilm_fast::projected_attention);
}
