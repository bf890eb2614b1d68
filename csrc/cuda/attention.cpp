#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "attention_cuda.h"
#include "cuda_operator.h"
#include "projection.h"

namespace minilm_fast::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that all operators here have behind their tensors.
struct Options {
  const at::Tensor &cu_seqlens, &segments;
  const OptionalTensor& cu_queries;
  int64_t max_seqlen;
  double scale;
  const OptionalTensor &relative_bias, &position_ids;
  double dropout;
  const OptionalTensor& seed;
};

void check_operands(const char* op, const Projection& x) {
  check_tensor(op, "q", x.q, x.q, {at::kHalf, at::kBFloat16});
  check_heads(op, "q", x.q);
  check_tensor(op, "k", x.k, x.q, {x.q.scalar_type()});
  check_shape(op, "k", x.k, {-1, x.q.size(1), x.q.size(2)});
  check_tensor(op, "v", x.v, x.q, {x.q.scalar_type()});
  check_shape(op, "v", x.v, x.k.sizes());
}

// All but the results and the tensors' addresses.
Attention checked(const char* op, const Projection& x, const Options& options) {
  check_operands(op, x);
  TORCH_CHECK(options.relative_bias.has_value() == options.position_ids.has_value(), op,
              ": relative_bias and position_ids go together");
  const int64_t heads = x.q.size(1);
  Attention p{};
  p.segments = check_device_ints(op, "segments", options.segments, x.q, {-1, 3});
  const int64_t batch = options.segments.size(0);
  p.cu_seqlens = check_device_ints(op, "cu_seqlens", options.cu_seqlens, x.q, {batch + 1});
  if (options.cu_queries.has_value())
    p.cu_queries = check_device_ints(op, "cu_queries", *options.cu_queries, x.q, {batch + 1});
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(options.max_seqlen >= 0 && options.max_seqlen <= kMost && x.k.size(0) <= kMost && batch <= 65535 &&
                  heads <= 65535,
              op, ": the batch is too large: ", batch, " sequences of up to ", options.max_seqlen, " tokens, ", heads,
              " heads");
  if (options.relative_bias.has_value()) {
    set_relative_bias(op, *options.relative_bias, x.q, heads, p);
    p.position_ids = check_device_ints(op, "position_ids", *options.position_ids, x.q, {x.k.size(0)});
  }
  p.dtype = x.q.scalar_type() == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
  p.batch = static_cast<int32_t>(batch);
  p.heads = static_cast<int32_t>(heads);
  p.size = static_cast<int32_t>(x.q.size(2));
  p.max_seqlen = static_cast<int32_t>(options.max_seqlen);
  p.queries = x.q.size(0);
  p.scale = static_cast<float>(options.scale);
  p.dropout = make_dropout(options.dropout, check_seed(op, options.dropout, options.seed));
  return p;
}

// The operands with rows that the kernels can copy, which must live until these are launched.
Projection placed(const Projection& given, Attention& p) {
  Projection x = {aligned_rows(given.q), aligned_rows(given.k), aligned_rows(given.v)};
  p.q = x.q.const_data_ptr();
  p.k = x.k.const_data_ptr();
  p.v = x.v.const_data_ptr();
  p.q_token = x.q.stride(0);
  p.q_head = x.q.stride(1);
  p.k_token = x.k.stride(0);
  p.k_head = x.k.stride(1);
  p.v_token = x.v.stride(0);
  p.v_head = x.v.stride(1);
  return x;
}

std::tuple<at::Tensor, at::Tensor> run(const char* op, const Projection& given, const Options& options) {
  Attention p = checked(op, given, options);
  const Launching launching(given.q);
  const Projection x = placed(given, p);
  at::Tensor out = at::empty(x.q.sizes(), x.q.options());
  at::Tensor lse = at::empty({p.heads, p.queries}, x.q.options().dtype(at::kFloat));
  p.out = out.data_ptr();
  p.lse = lse.data_ptr<float>();
  check_launch(op, launch_attention(p, launching.stream()));
  return {out, lse};
}

// How many fixed-point units of a gradient of a score are 1, a power of two, and the largest norm of a row of v: fp32
// [2]. No such gradient is larger than twice the largest of factor * |grad_out_i| * |v_j|.
at::Tensor bias_units(const at::Tensor& grad_out, const at::Tensor& v, float factor) {
  const auto largest = [](const at::Tensor& x) {
    return at::linalg_vector_norm(x, 2, at::OptionalIntArrayRef({-1}), false, at::kFloat).amax();
  };
  const at::Tensor norm = largest(v), bound = (largest(grad_out) * norm * (2 * factor)).clamp_min(1e-20);
  return at::stack({(kBiasUnits / bound).log2().floor().exp2(), norm});
}

// Numbers that are none leave no trace in an integer: those of k and q show in lse, the others in the units.
at::Tensor bias_gradient_of(const at::Tensor& sums, const at::Tensor& units, const at::Tensor& lse) {
  const at::Tensor unit = units.select(0, 0);
  const at::Tensor finite = at::isfinite(lse).all().logical_and(at::isfinite(unit)).logical_and(unit > 0);
  return at::where(finite, sums.to(at::kDouble) / unit.to(at::kDouble), NAN).to(at::kFloat);
}

// Writes the gradients of q, k and v, whose rows are those of new tensors; returns that of the bias, which is empty
// unless wanted.
at::Tensor differentiate(const char* op, const at::Tensor& grad_out, const Projection& given, const at::Tensor& out,
                         const at::Tensor& lse, const Options& options, bool bias_gradient,
                         const Projection& gradients) {
  AttentionGradients p{};
  p.forward = checked(op, given, options);
  check_tensor(op, "grad_out", grad_out, given.q, {given.q.scalar_type()});
  check_shape(op, "grad_out", grad_out, given.q.sizes());
  check_tensor(op, "out", out, given.q, {given.q.scalar_type()});
  check_shape(op, "out", out, given.q.sizes());
  check_device_floats(op, "lse", lse, given.q, {p.forward.heads, p.forward.queries});
  TORCH_CHECK(!bias_gradient || options.relative_bias.has_value(), op, ": there is no relative_bias");
  TORCH_CHECK(!bias_gradient || p.forward.distance_limit <= kMostBiasDistance, op,
              ": the CUDA kernel gives the gradient of a relative_bias up to the distance ", kMostBiasDistance,
              ", got one up to ", p.forward.distance_limit);

  const Launching launching(given.q);
  const Projection x = placed(given, p.forward);
  const at::Tensor grad_rows = aligned_rows(grad_out), out_rows = aligned_rows(out);
  at::Tensor statistics = at::empty({2, p.forward.heads, p.forward.queries}, lse.options());
  p.forward.lse = lse.data_ptr<float>();
  p.grad_out = grad_rows.const_data_ptr();
  p.grad_token = grad_rows.stride(0);
  p.grad_head = grad_rows.stride(1);
  p.out = out_rows.const_data_ptr();
  p.out_token = out_rows.stride(0);
  p.out_head = out_rows.stride(1);
  p.dq = gradients.q.data_ptr();
  p.dk = gradients.k.data_ptr();
  p.dv = gradients.v.data_ptr();
  p.dq_token = gradients.q.stride(0);
  p.dk_token = gradients.k.stride(0);
  p.dv_token = gradients.v.stride(0);
  p.statistics = statistics.data_ptr<float>();
  at::Tensor units, sums;
  // Without rows there is no largest norm.
  const bool summed = bias_gradient && p.forward.queries > 0 && p.forward.heads > 0;
  if (bias_gradient) sums = at::zeros(options.relative_bias->sizes(), lse.options().dtype(at::kLong));
  if (summed) {
    units = bias_units(grad_rows, x.v, p.forward.dropout.scale);
    p.bias_sums = sums.data_ptr<int64_t>();
    p.bias_units = units.const_data_ptr<float>();
  }
  check_launch(op, launch_attention_backward(p, launching.stream()));
  if (summed) return bias_gradient_of(sums, units, lse);
  return bias_gradient ? sums.to(at::kFloat) : at::empty({0}, lse.options());
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                             const OptionalTensor& cu_queries, int64_t max_seqlen, double scale,
                                             const OptionalTensor& relative_bias, const OptionalTensor& position_ids,
                                             double dropout, const OptionalTensor& seed) {
  return run("attention", {q, k, v},
             {cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias, position_ids, dropout, seed});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens, const at::Tensor& segments, const OptionalTensor& cu_queries,
    int64_t max_seqlen, double scale, const OptionalTensor& relative_bias, const OptionalTensor& position_ids,
    double dropout, const OptionalTensor& seed, bool bias_gradient) {
  const Projection gradients = {at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()),
                                at::empty(v.sizes(), v.options())};
  at::Tensor bias =
      differentiate("attention_backward", grad_out, {q, k, v}, out, lse,
                    {cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias, position_ids, dropout, seed},
                    bias_gradient, gradients);
  return {gradients.q, gradients.k, gradients.v, bias};
}

Projection split(const char* op, const at::Tensor& projection, const OptionalTensor& queries) {
  const int64_t parts = projection_parts(queries);
  TORCH_CHECK(projection.dim() == 4 && projection.size(1) == parts, op, ": projection must be [tokens, ", parts,
              ", heads, head_dim], got ", projection.sizes());
  return split_projection(projection, queries);
}

std::tuple<at::Tensor, at::Tensor> projected_attention(const at::Tensor& projection, const OptionalTensor& queries,
                                                       const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                                       const OptionalTensor& cu_queries, int64_t max_seqlen,
                                                       double scale, const OptionalTensor& relative_bias,
                                                       const OptionalTensor& position_ids, double dropout,
                                                       const OptionalTensor& seed) {
  constexpr char kOp[] = "projected_attention";
  return run(kOp, split(kOp, projection, queries),
             {cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias, position_ids, dropout, seed});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> projected_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& projection, const OptionalTensor& queries, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens, const at::Tensor& segments, const OptionalTensor& cu_queries,
    int64_t max_seqlen, double scale, const OptionalTensor& relative_bias, const OptionalTensor& position_ids,
    double dropout, const OptionalTensor& seed, bool bias_gradient) {
  constexpr char kOp[] = "projected_attention_backward";
  const Projection inputs = split(kOp, projection, queries);
  at::Tensor whole = at::empty(projection.sizes(), projection.options());
  OptionalTensor own;
  if (queries.has_value()) own = at::empty(queries->sizes(), queries->options());
  at::Tensor bias =
      differentiate(kOp, grad_out, inputs, out, lse,
                    {cu_seqlens, segments, cu_queries, max_seqlen, scale, relative_bias, position_ids, dropout, seed},
                    bias_gradient, split(kOp, whole, own));
  return {whole, own.has_value() ? *own : at::empty({0}, projection.options()), bias};
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("attention", &minilm_fast::cuda::attention);
  m.impl("attention_backward", &minilm_fast::cuda::attention_backward);
  m.impl("projected_attention", &minilm_fast::cuda::projected_attention);
  m.impl("projected_attention_backward", &minilm_fast::cuda::projected_attention_backward);
}
