#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "norm.h"
#include "norm_checks.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Rows whose parameter gradients are summed one after another; the sums of the blocks are then added in order, so that
// the result does not depend on the number of threads.
constexpr int64_t kRowBlock = 64;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

float* row_buffers(int64_t channels) {
  static thread_local Scratch scratch;
  return reinterpret_cast<float*>(scratch.get(2 * round_up(channels, kRowMultiple) * sizeof(float)));
}

DropoutSum check_sum(const char* op, const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& x_bias,
                     double dropout, const OptionalTensor& seed) {
  check_matrix(op, "x", x);
  DropoutSum sum{};
  sum.x = x.const_data_ptr();
  sum.x_bf16 = x.scalar_type() == at::kBFloat16;
  sum.x_stride = x.stride(0);
  sum.channels = x.size(1);
  if (residual.has_value()) {
    check_matrix(op, "residual", *residual);
    check_shape(op, "residual", *residual, x.sizes());
    sum.residual = residual->const_data_ptr();
    sum.residual_bf16 = residual->scalar_type() == at::kBFloat16;
    sum.residual_stride = residual->stride(0);
  }
  if (x_bias.has_value()) sum.x_bias = check_floats(op, "x_bias", *x_bias, {sum.channels});
  sum.dropout = dropout;
  sum.seed = check_seed(op, dropout, seed);
  return sum;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dropout_add_layer_norm(
    const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& weight, const at::Tensor& bias, double eps,
    double dropout, const OptionalTensor& seed, const OptionalTensor& x_bias) {
  constexpr char kOp[] = "dropout_add_layer_norm";
  DropoutNormProblem problem{};
  problem.sum = check_sum(kOp, x, residual, x_bias, dropout, seed);
  const int64_t rows = x.size(0), channels = x.size(1);
  problem.weight = check_floats(kOp, "weight", weight, {channels});
  problem.bias = check_floats(kOp, "bias", bias, {channels});
  problem.eps = static_cast<float>(eps);
  at::Tensor out = at::empty(x.sizes(), x.options());
  at::Tensor mean = at::empty({rows}, weight.options()), rstd = at::empty({rows}, weight.options());
  if (x.numel() == 0) return {out, mean.zero_(), rstd.zero_()};
  problem.out = out.data_ptr();
  problem.mean = mean.data_ptr<float>();
  problem.rstd = rstd.data_ptr<float>();
  const NormKernels kernels = norm_kernels();
  at::parallel_for(0, rows, grain(channels), [&](int64_t begin, int64_t end) {
    kernels.dropout_norm(problem, begin, end, row_buffers(channels));
  });
  return {out, mean, rstd};
}

// Runs task(begin, end, sums) on blocks of rows, each with zeroed `sums` of `width` floats, and returns the total.
template <class Task>
at::Tensor sum_over_blocks(int64_t rows, int64_t width, const at::TensorOptions& options, const Task& task) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const at::Tensor partial = at::zeros({blocks, width}, options.dtype(at::kFloat));
  float* sums = partial.data_ptr<float>();
  run_tasks(blocks, [&](int64_t block) {
    task(block * kRowBlock, std::min(rows, (block + 1) * kRowBlock), sums + block * width);
  });
  at::Tensor total = at::empty({width}, partial.options());
  float* totals = total.data_ptr<float>();
  at::parallel_for(0, width, 256, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += sums[block * width + d];
      totals[d] = static_cast<float>(sum);
    }
  });
  return total;
}

// The gradient, contiguous, after a check against the shape and type of the output.
at::Tensor check_grad(const char* op, const at::Tensor& grad, const at::Tensor& x) {
  check_dtype(op, "grad", grad, {x.scalar_type()});
  check_shape(op, "grad", grad, x.sizes());
  return grad.contiguous();
}

// A part of the sums as a tensor of its own.
at::Tensor copy_part(const at::Tensor& sums, int64_t start, int64_t length) {
  return sums.narrow(0, start, length).clone();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dropout_add_layer_norm_backward(
    const at::Tensor& grad_any, const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& weight,
    const at::Tensor& mean, const at::Tensor& rstd, double dropout, const OptionalTensor& seed,
    const OptionalTensor& x_bias) {
  constexpr char kOp[] = "dropout_add_layer_norm_backward";
  DropoutNormGradient problem{};
  problem.sum = check_sum(kOp, x, residual, x_bias, dropout, seed);
  const at::Tensor grad = check_grad(kOp, grad_any, x);
  const int64_t rows = x.size(0), channels = x.size(1), padded = round_up(channels, kSumMultiple);
  problem.grad = grad.const_data_ptr();
  problem.weight = check_floats(kOp, "weight", weight, {channels});
  problem.mean = check_floats(kOp, "mean", mean, {rows});
  problem.rstd = check_floats(kOp, "rstd", rstd, {rows});
  at::Tensor x_grad = at::empty(x.sizes(), x.options());
  // Without dropout the gradients of x and residual are the same numbers.
  const bool apart = residual.has_value() && (dropout > 0 || residual->scalar_type() != x.scalar_type());
  at::Tensor residual_grad = apart ? at::empty(x.sizes(), residual->options()) : at::empty({0}, x.options());
  problem.x_grad = x_grad.data_ptr();
  problem.residual_grad = apart ? residual_grad.data_ptr() : nullptr;
  const NormKernels kernels = norm_kernels();
  const at::Tensor sums =
      sum_over_blocks(channels > 0 ? rows : 0, 3 * padded, x.options(), [&](int64_t begin, int64_t end, float* sums) {
        kernels.dropout_norm_backward(problem, begin, end, row_buffers(channels), sums);
      });
  return {x_grad, residual_grad, copy_part(sums, 0, channels), copy_part(sums, padded, channels),
          copy_part(sums, 2 * padded, x_bias.has_value() ? channels : 0)};
}

std::tuple<at::Tensor, at::Tensor> bias_gelu_backward(const at::Tensor& grad_any, const at::Tensor& x,
                                                      const OptionalTensor& bias) {
  constexpr char kOp[] = "bias_gelu_backward";
  check_matrix(kOp, "x", x);
  const at::Tensor grad = check_grad(kOp, grad_any, x);
  const int64_t rows = x.size(0), channels = x.size(1);
  GeluGradient problem{};
  if (bias.has_value()) problem.bias = check_floats(kOp, "bias", *bias, {channels});
  at::Tensor x_grad = at::empty(x.sizes(), x.options());
  problem.grad = grad.const_data_ptr();
  problem.x = x.const_data_ptr();
  problem.x_grad = x_grad.data_ptr();
  problem.bf16 = x.scalar_type() == at::kBFloat16;
  problem.x_stride = x.stride(0);
  problem.channels = channels;
  const NormKernels kernels = norm_kernels();
  const at::Tensor sums = sum_over_blocks(
      channels > 0 ? rows : 0, bias.has_value() ? round_up(channels, kSumMultiple) : 0, x.options(),
      [&](int64_t begin, int64_t end, float* sums) { kernels.bias_gelu_backward(problem, begin, end, sums); });
  return {x_grad, copy_part(sums, 0, bias.has_value() ? channels : 0)};
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("dropout_add_layer_norm", &minilm_fast::dropout_add_layer_norm);
  m.impl("dropout_add_layer_norm_backward", &minilm_fast::dropout_add_layer_norm_backward);
  m.impl("bias_gelu_backward", &minilm_fast::bias_gelu_backward);
}
