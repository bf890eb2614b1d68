#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "attention.h"
#include "attention_operands.h"
#include "isa.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

using Optional = std::optional<at::Tensor>;

AttentionBackwardKernel choose_kernel(bool bf16) {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAmx && bf16) return attention_backward_amx;
  if (current_isa() >= Isa::kAvx512) return attention_backward_avx512;
  if (current_isa() >= Isa::kAvx2) return attention_backward_avx2;
#endif
  return attention_backward_default;
}

struct Results {
  const at::Tensor &grad_out, &out, &lse;
};

// Sums [batch, heads, bins] over the batch, always in the same order.
at::Tensor sum_over_batch(const at::Tensor& parts) {
  const int64_t batch = parts.size(0), count = parts.size(1) * parts.size(2);
  at::Tensor total = at::empty({parts.size(1), parts.size(2)}, parts.options());
  const float* from = parts.const_data_ptr<float>();
  float* to = total.data_ptr<float>();
  at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = 0.0f;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = begin; i < end; ++i) to[i] += from[b * count + i];
  });
  return total;
}

// Writes the gradients of q, k and v, in each of whose rows [heads, size] is contiguous; returns that of the relative
// bias, or an empty tensor.
at::Tensor differentiate(const char* op, const Results& results, const AttentionOperands& operands, bool bias_gradient,
                         const Projection& to) {
  int64_t longest = 0;
  const AttentionProblem problem = make_problem(op, operands, longest);
  const at::Tensor &q = operands.q, &lse = results.lse;
  TORCH_CHECK(!bias_gradient || operands.relative_bias.has_value(), op, ": there is no relative_bias");
  check_rows(op, "grad_out", results.grad_out, q, q.size(0));
  check_rows(op, "out", results.out, q, q.size(0));

  AttentionGradients gradients{};
  gradients.out = results.out.const_data_ptr();
  gradients.grad_out = results.grad_out.const_data_ptr();
  gradients.lse = check_floats(op, "lse", lse, {q.size(1), q.size(0)});
  gradients.out_token = results.out.stride(0);
  gradients.out_head = results.out.stride(1);
  gradients.grad_out_token = results.grad_out.stride(0);
  gradients.grad_out_head = results.grad_out.stride(1);
  gradients.q = to.q.data_ptr();
  gradients.k = to.k.data_ptr();
  gradients.v = to.v.data_ptr();
  gradients.q_token = to.q.stride(0);
  gradients.k_token = to.k.stride(0);
  gradients.v_token = to.v.stride(0);

  const std::vector<AttentionTask> tasks = make_tasks(operands);
  const int64_t bins = bias_gradient ? 2 * problem.distance_limit + 1 : 0;
  const at::Tensor parts = at::empty({operands.segments.size(0), problem.heads, bins}, lse.options());
  float* part = bias_gradient ? parts.data_ptr<float>() : nullptr;
  const AttentionBackwardKernel kernel = choose_kernel(problem.bf16);
  const size_t bytes = sizeof(float) * static_cast<size_t>(attention_backward_scratch(problem, longest));
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    kernel(problem, gradients, tasks[i], part == nullptr ? nullptr : part + i * bins,
           reinterpret_cast<float*>(scratch.get(bytes)));
  });
  return bias_gradient ? sum_over_batch(parts) : at::empty({0}, lse.options());
}

// A gradient comes from anywhere, expanded for instance.
at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.dim() == 0 || x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens, const at::Tensor& segments, const Optional& cu_queries,
    int64_t max_seqlen, double scale, const Optional& relative_bias, const Optional& position_ids, double dropout,
    const Optional& seed, bool bias_gradient) {
  const AttentionOperands operands{
      q, k, v, cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias, position_ids, dropout, seed};
  const Projection to{at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()),
                      at::empty(v.sizes(), v.options())};
  const at::Tensor grad = with_contiguous_rows(grad_out);
  const at::Tensor bias = differentiate("attention_backward", {grad, out, lse}, operands, bias_gradient, to);
  return {to.q, to.k, to.v, bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> projected_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& projection, const Optional& queries, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens, const at::Tensor& segments, const Optional& cu_queries,
    int64_t max_seqlen, double scale, const Optional& relative_bias, const Optional& position_ids, double dropout,
    const Optional& seed, bool bias_gradient) {
  constexpr char kOp[] = "projected_attention_backward";
  const Projection from = checked_projection(kOp, projection, queries);
  const AttentionOperands operands{from.q,     from.k, from.v,        cu_seqlens,   segments, cu_queries,
                                   max_seqlen, scale,  relative_bias, position_ids, dropout,  seed};
  const at::Tensor gradient = at::empty(projection.sizes(), projection.options());
  const at::Tensor own =
      queries.has_value() ? at::empty(queries->sizes(), queries->options()) : at::empty({0}, projection.options());
  const Projection to = split_projection(gradient, queries.has_value() ? Optional(own) : std::nullopt);
  const at::Tensor grad = with_contiguous_rows(grad_out);
  return {gradient, own, differentiate(kOp, {grad, out, lse}, operands, bias_gradient, to)};
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("attention_backward", &minilm_fast::attention_backward);
  m.impl("projected_attention_backward", &minilm_fast::projected_attention_backward);
}
