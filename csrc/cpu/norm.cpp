#include "norm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "isa.h"
#include "norm_checks.h"

namespace minilm_fast {
NormKernels norm_kernels() {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAvx512) return norm_kernels_avx512();
  if (current_isa() >= Isa::kAvx2) return norm_kernels_avx2();
#endif
  return norm_kernels_default();
}

namespace {

at::Tensor add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight,
                          const at::Tensor& bias, double eps) {
  constexpr char kOp[] = "add_layer_norm";
  check_matrix(kOp, "x", x);
  const int64_t channels = x.size(1);
  NormProblem problem{};
  problem.weight = check_floats(kOp, "weight", weight, {channels});
  problem.bias = check_floats(kOp, "bias", bias, {channels});
  problem.eps = static_cast<float>(eps);
  problem.x = x.const_data_ptr();
  problem.x_bf16 = x.scalar_type() == at::kBFloat16;
  problem.x_stride = x.stride(0);
  problem.channels = channels;
  if (residual.has_value()) {
    check_matrix(kOp, "residual", *residual);
    check_shape(kOp, "residual", *residual, x.sizes());
    problem.residual = residual->const_data_ptr();
    problem.residual_bf16 = residual->scalar_type() == at::kBFloat16;
    problem.residual_stride = residual->stride(0);
  }
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  problem.out = out.data_ptr();
  const NormKernels kernels = norm_kernels();
  at::parallel_for(0, x.size(0), grain(channels),
                   [&](int64_t begin, int64_t end) { kernels.add_layer_norm(problem, begin, end); });
  return out;
}

at::Tensor bias_gelu(const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  constexpr char kOp[] = "bias_gelu";
  check_matrix(kOp, "x", x);
  GeluProblem problem{};
  if (bias.has_value()) problem.bias = check_floats(kOp, "bias", *bias, {x.size(1)});
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  problem.x = x.const_data_ptr();
  problem.out = out.data_ptr();
  problem.bf16 = x.scalar_type() == at::kBFloat16;
  problem.x_stride = x.stride(0);
  problem.channels = x.size(1);
  const NormKernels kernels = norm_kernels();
  at::parallel_for(0, x.size(0), grain(x.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.bias_gelu(problem, begin, end); });
  return out;
}

// The indices and the table that they look up, checked against each other.
std::pair<const int32_t*, const float*> check_lookup(const char* ids_name, const at::Tensor& ids,
                                                     const char* table_name, const at::Tensor& table, int64_t tokens,
                                                     int64_t channels) {
  constexpr char kOp[] = "embed_layer_norm";
  const int32_t* index = check_ints(kOp, ids_name, ids, {tokens});
  const float* rows = check_floats(kOp, table_name, table, {-1, channels});
  for (int64_t i = 0; i < tokens; ++i)
    TORCH_CHECK(index[i] >= 0 && index[i] < table.size(0), kOp, ": ", ids_name, "[", i, "] is ", index[i], ", ",
                table_name, " has ", table.size(0), " rows");
  return {index, rows};
}

at::Tensor embed_layer_norm(const at::Tensor& ids, const at::Tensor& positions, const std::optional<at::Tensor>& types,
                            const at::Tensor& word, const at::Tensor& position, const std::optional<at::Tensor>& type,
                            const at::Tensor& weight, const at::Tensor& bias, double eps) {
  constexpr char kOp[] = "embed_layer_norm";
  TORCH_CHECK(ids.dim() == 1, kOp, ": ids must be [tokens], got ", ids.sizes());
  TORCH_CHECK(word.dim() == 2, kOp, ": word must be [rows, channels], got ", word.sizes());
  const int64_t tokens = ids.size(0), channels = word.size(1);
  EmbedProblem problem{};
  std::tie(problem.ids, problem.word) = check_lookup("ids", ids, "word", word, tokens, channels);
  std::tie(problem.positions, problem.position) =
      check_lookup("positions", positions, "position", position, tokens, channels);
  if (types.has_value() && type.has_value())
    std::tie(problem.types, problem.type) = check_lookup("types", *types, "type", *type, tokens, channels);
  problem.channels = channels;
  problem.weight = check_floats(kOp, "weight", weight, {channels});
  problem.bias = check_floats(kOp, "bias", bias, {channels});
  problem.eps = static_cast<float>(eps);
  at::Tensor out = at::empty({tokens, channels}, word.options());
  if (out.numel() == 0) return out;
  problem.out = out.data_ptr<float>();
  const NormKernels kernels = norm_kernels();
  at::parallel_for(0, tokens, grain(channels),
                   [&](int64_t begin, int64_t end) { kernels.embed_layer_norm(problem, begin, end); });
  return out;
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("add_layer_norm", &minilm_fast::add_layer_norm);
  m.impl("bias_gelu", &minilm_fast::bias_gelu);
  m.impl("embed_layer_norm", &minilm_fast::embed_layer_norm);
}
