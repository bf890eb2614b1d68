#include "adamw.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "isa.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "adamw";

AdamWKernel choose_kernel() {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAvx512) return adamw_avx512;
  if (current_isa() >= Isa::kAvx2) return adamw_avx2;
#endif
  return adamw_default;
}

float* check_state(const char* name, const at::Tensor& x, const at::Tensor& param) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, kOp, ": ", name, " must be float32, got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == param.sizes(), kOp, ": ", name, " must be ", param.sizes(), " like param, got ", x.sizes());
  TORCH_CHECK(x.is_contiguous(), kOp, ": ", name, " must be contiguous");
  return x.data_ptr<float>();
}

void adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& mean, const at::Tensor& square,
           double step_size, double beta1, double beta2, double eps, double decay) {
  AdamWProblem problem{};
  problem.param = check_state("param", param, param);
  problem.grad = check_state("grad", grad, param);
  problem.mean = check_state("mean", mean, param);
  problem.square = check_state("square", square, param);
  problem.step_size = static_cast<float>(step_size);
  problem.rest1 = static_cast<float>(1.0 - beta1);
  problem.rest2 = static_cast<float>(1.0 - beta2);
  problem.beta2 = static_cast<float>(beta2);
  problem.eps = static_cast<float>(eps);
  problem.decay = static_cast<float>(decay);
  // Pieces of whole cache lines, so that the result does not depend on how many threads share the work.
  constexpr int64_t kLine = 16, kGrain = 4096;
  const int64_t count = param.numel(), lines = (count + kLine - 1) / kLine;
  const AdamWKernel kernel = choose_kernel();
  at::parallel_for(0, lines, kGrain / kLine, [&](int64_t begin, int64_t end) {
    kernel(problem, begin * kLine, end * kLine < count ? end * kLine : count);
  });
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("adamw", &minilm_fast::adamw); }
