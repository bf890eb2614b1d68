#include "attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "attention";

void check_rows(const char* name, const at::Tensor& x, const at::Tensor& q) {
  check_dtype(kOp, name, x, {q.scalar_type()});
  check_shape(kOp, name, x, q.sizes());
  check_rows_contiguous(kOp, name, x);
}

// Checks that the segments fill the sequences and the sequences the tokens; gives the longest length.
int64_t check_layout(const at::Tensor& cu_seqlens, const at::Tensor& segments, int64_t tokens) {
  const int32_t* counts = check_ints(kOp, "segments", segments, {-1, 3});
  const int64_t batch = segments.size(0);
  const int32_t* starts = check_ints(kOp, "cu_seqlens", cu_seqlens, {batch + 1});
  TORCH_CHECK(starts[0] == 0 && starts[batch] == tokens, kOp, ": cu_seqlens must go from 0 to the ", tokens,
              " tokens of q, got ", starts[0], " to ", starts[batch]);
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int32_t* c = counts + 3 * i;
    TORCH_CHECK(c[0] >= 0 && c[1] >= 0 && c[2] >= 0, kOp, ": segments[", i, "] holds a negative count");
    const int64_t length = int64_t{c[0]} + c[1] + c[2];
    TORCH_CHECK(int64_t{starts[i + 1]} - starts[i] == length, kOp, ": segments[", i, "] adds up to ", length,
                " tokens, cu_seqlens says ", int64_t{starts[i + 1]} - starts[i]);
    longest = std::max(longest, length);
  }
  return longest;
}

void set_bias(AttentionProblem& problem, const at::Tensor& bias, const at::Tensor& positions) {
  problem.distance_limit = check_relative_bias(kOp, bias, problem.heads);
  problem.relative_bias = bias.const_data_ptr<float>();
  problem.positions = check_ints(kOp, "position_ids", positions, {problem.tokens});
}

// One task for each head of each sequence; where that leaves threads idle, the rows are cut as well. A task that
// prepares the keys for few rows wastes work, hence the least size.
std::vector<AttentionTask> make_tasks(const AttentionProblem& problem, const at::Tensor& cu_seqlens,
                                      const at::Tensor& segments) {
  constexpr int64_t kLeastRows = 120;
  const int64_t batch = segments.size(0);
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* counts = segments.const_data_ptr<int32_t>();
  const int64_t wanted = 4 * int64_t{at::get_num_threads()};
  const int64_t share = std::max(kLeastRows, problem.tokens * problem.heads / wanted);
  std::vector<AttentionTask> tasks;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t length = int64_t{starts[i + 1]} - starts[i];
    const int64_t pieces = std::max<int64_t>(1, length / share);
    const int64_t rows = (length + pieces - 1) / pieces;
    for (int64_t head = 0; head < problem.heads; ++head)
      for (int64_t row = 0; row < length; row += rows)
        tasks.push_back(
            {starts[i], counts[3 * i], counts[3 * i + 1], counts[3 * i + 2], head, row, std::min(row + rows, length)});
  }
  return tasks;
}

AttentionKernel choose_kernel(bool bf16) {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAmx && bf16) return attention_amx;
  if (current_isa() >= Isa::kAvx512) return attention_avx512;
  if (current_isa() >= Isa::kAvx2) return attention_avx2;
#endif
  return attention_default;
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                             int64_t max_seqlen, double scale,
                                             const std::optional<at::Tensor>& relative_bias,
                                             const std::optional<at::Tensor>& position_ids) {
  check_float(kOp, "q", q);
  check_head_size(kOp, q);
  check_rows("q", q, q);
  check_rows("k", k, q);
  check_rows("v", v, q);
  const int64_t longest = check_layout(cu_seqlens, segments, q.size(0));
  TORCH_CHECK(max_seqlen >= longest, kOp, ": max_seqlen is ", max_seqlen, ", the longest sequence has ", longest,
              " tokens");
  TORCH_CHECK(relative_bias.has_value() == position_ids.has_value(), kOp,
              ": relative_bias and position_ids go together");

  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  AttentionProblem problem{};
  problem.q = q.const_data_ptr();
  problem.k = k.const_data_ptr();
  problem.v = v.const_data_ptr();
  problem.out = out.data_ptr();
  problem.lse = lse.data_ptr<float>();
  problem.bf16 = q.scalar_type() == at::kBFloat16;
  problem.tokens = q.size(0);
  problem.heads = q.size(1);
  problem.size = q.size(2);
  problem.q_token = q.stride(0);
  problem.q_head = q.stride(1);
  problem.k_token = k.stride(0);
  problem.k_head = k.stride(1);
  problem.v_token = v.stride(0);
  problem.v_head = v.stride(1);
  problem.scale = scale;
  if (relative_bias.has_value()) set_bias(problem, *relative_bias, *position_ids);
  if (q.numel() == 0) return {out, lse};

  const std::vector<AttentionTask> tasks = make_tasks(problem, cu_seqlens, segments);
  const AttentionKernel kernel = choose_kernel(problem.bf16);
  const size_t bytes = sizeof(float) * static_cast<size_t>(attention_scratch(problem, longest));
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    kernel(problem, tasks[i], reinterpret_cast<float*>(scratch.get(bytes)));
  });
  return {out, lse};
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("attention", &minilm_fast::attention); }
