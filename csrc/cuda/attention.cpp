#include <ATen/ops/empty.h>

#include <limits>
#include <tuple>

#include "attention_cuda.h"
#include "cuda_operator.h"
#include "projection.h"

namespace minilm_fast::cuda {
namespace {

void check_operands(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_tensor(op, "q", q, q, {at::kHalf, at::kBFloat16});
  check_heads(op, "q", q);
  check_tensor(op, "k", k, q, {q.scalar_type()});
  check_shape(op, "k", k, {-1, q.size(1), q.size(2)});
  check_tensor(op, "v", v, q, {q.scalar_type()});
  check_shape(op, "v", v, k.sizes());
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
                                             const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                             const std::optional<at::Tensor>& cu_queries, int64_t max_seqlen,
                                             double scale, const std::optional<at::Tensor>& relative_bias,
                                             const std::optional<at::Tensor>& position_ids, double dropout,
                                             const std::optional<at::Tensor>& seed) {
  constexpr char kOp[] = "attention";
  check_operands(kOp, q_any, k_any, v_any);
  TORCH_CHECK(dropout == 0.0, kOp, ": the CUDA kernel has no dropout, got ", dropout);
  TORCH_CHECK(relative_bias.has_value() == position_ids.has_value(), kOp,
              ": relative_bias and position_ids go together");
  const int64_t heads = q_any.size(1);
  Attention p{};
  p.segments = check_device_ints(kOp, "segments", segments, q_any, {-1, 3});
  const int64_t batch = segments.size(0);
  p.cu_seqlens = check_device_ints(kOp, "cu_seqlens", cu_seqlens, q_any, {batch + 1});
  if (cu_queries.has_value()) p.cu_queries = check_device_ints(kOp, "cu_queries", *cu_queries, q_any, {batch + 1});
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(max_seqlen >= 0 && max_seqlen <= kMost && k_any.size(0) <= kMost && batch <= 65535 && heads <= 65535, kOp,
              ": the batch is too large: ", batch, " sequences of up to ", max_seqlen, " tokens, ", heads, " heads");
  if (relative_bias.has_value()) {
    set_relative_bias(kOp, *relative_bias, q_any, heads, p);
    p.position_ids = check_device_ints(kOp, "position_ids", *position_ids, q_any, {k_any.size(0)});
  }

  const Launching launching(q_any);
  const at::Tensor q = aligned_rows(q_any), k = aligned_rows(k_any), v = aligned_rows(v_any);
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({heads, q.size(0)}, q.options().dtype(at::kFloat));
  p.dtype = q.scalar_type() == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.out = out.data_ptr();
  p.lse = lse.data_ptr<float>();
  p.q_token = q.stride(0);
  p.q_head = q.stride(1);
  p.k_token = k.stride(0);
  p.k_head = k.stride(1);
  p.v_token = v.stride(0);
  p.v_head = v.stride(1);
  p.batch = static_cast<int32_t>(batch);
  p.heads = static_cast<int32_t>(heads);
  p.size = static_cast<int32_t>(q.size(2));
  p.max_seqlen = static_cast<int32_t>(max_seqlen);
  p.queries = q.size(0);
  p.scale = static_cast<float>(scale);
  check_launch(kOp, launch_attention(p, launching.stream()));
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> projected_attention(const at::Tensor& projection,
                                                       const std::optional<at::Tensor>& queries,
                                                       const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                                       const std::optional<at::Tensor>& cu_queries, int64_t max_seqlen,
                                                       double scale, const std::optional<at::Tensor>& relative_bias,
                                                       const std::optional<at::Tensor>& position_ids, double dropout,
                                                       const std::optional<at::Tensor>& seed) {
  const int64_t parts = projection_parts(queries);
  TORCH_CHECK(projection.dim() == 4 && projection.size(1) == parts, "projected_attention: projection must be [tokens, ",
              parts, ", heads, head_dim], got ", projection.sizes());
  const Projection from = split_projection(projection, queries);
  return attention(from.q, from.k, from.v, cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias,
                   position_ids, dropout, seed);
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("attention", &minilm_fast::cuda::attention);
  m.impl("projected_attention", &minilm_fast::cuda::projected_attention);
}
