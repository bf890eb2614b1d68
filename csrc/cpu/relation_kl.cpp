#include "relation_kl.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "relation_kl";
// So many heads of sequences keep the threads of any machine busy; of fewer, the rows are shared out. Never decided by
// the number of threads: results must not depend on it.
constexpr int64_t kManyHeads = 32;
constexpr int64_t kPieces = 4;
constexpr int64_t kLeastRows = 120;
// Half of the scores of a shorter sequence are not worth the accuracy: the probability of an only token is exactly 1
// after its score was subtracted.
constexpr int64_t kLeastTriangle = 16;

using Optional = std::optional<at::Tensor>;

struct Layout {
  const int32_t *starts, *counts;
  int64_t batch, longest;

  int64_t length(int64_t i) const { return int64_t{starts[i + 1]} - starts[i]; }
};

Layout checked_layout(const at::Tensor& cu_seqlens, const at::Tensor& segments, int64_t max_seqlen, int64_t tokens) {
  const int64_t longest = check_layout(kOp, cu_seqlens, segments, max_seqlen, tokens, "the tensors");
  return {cu_seqlens.const_data_ptr<int32_t>(), segments.const_data_ptr<int32_t>(), segments.size(0), longest};
}

RelationOperand operand(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

RelationSide check_side(const std::string& name, const at::Tensor& a, const Optional& b, double scale) {
  const std::string name_a = name + "_a", name_b = name + "_b";
  check_float(kOp, name_a.c_str(), a);
  TORCH_CHECK(a.dim() == 3 && a.size(2) >= 1, kOp, ": ", name_a, " must be [tokens, heads, head_dim], got ", a.sizes());
  check_rows_contiguous(kOp, name_a.c_str(), a);
  if (b.has_value()) {
    check_dtype(kOp, name_b.c_str(), *b, {a.scalar_type()});
    check_shape(kOp, name_b.c_str(), *b, a.sizes());
    check_rows_contiguous(kOp, name_b.c_str(), *b);
  }
  const RelationOperand own = operand(a);
  return {own, b.has_value() ? operand(*b) : own, a.scalar_type() == at::kBFloat16, a.size(2), scale, nullptr};
}

RelationProblem check_problem(const at::Tensor& teacher_a, const Optional& teacher_b, const at::Tensor& student_a,
                              const Optional& student_b, double teacher_scale, double student_scale) {
  RelationProblem problem{};
  problem.teacher = check_side("teacher", teacher_a, teacher_b, teacher_scale);
  problem.student = check_side("student", student_a, student_b, student_scale);
  problem.tokens = student_a.size(0);
  problem.heads = student_a.size(1);
  check_shape(kOp, "teacher_a", teacher_a, {problem.tokens, problem.heads, -1});
  return problem;
}

void check_statistics(const char* name, const at::Tensor& lse, const RelationProblem& problem) {
  check_dtype(kOp, name, lse, {at::kDouble});
  check_shape(kOp, name, lse, {problem.heads, problem.tokens});
  check_contiguous(kOp, name, lse);
}

// The weight of a row's divergence in the loss, for each sequence.
std::vector<double> sequence_weights(const Layout& layout, int64_t heads, int64_t tokens, c10::string_view reduction) {
  int64_t filled = 0;
  for (int64_t i = 0; i < layout.batch; ++i) filled += layout.length(i) > 0;
  const bool batch_mean = reduction == "batch_mean";
  TORCH_CHECK(batch_mean || reduction == "token_mean" || reduction == "sum", kOp,
              ": reduction must be batch_mean, token_mean or sum, got ", reduction);
  std::vector<double> weights(layout.batch, 1.0);
  if (reduction == "sum") return weights;
  for (int64_t i = 0; i < layout.batch; ++i) {
    const int64_t rows = batch_mean ? layout.length(i) * filled : tokens;
    if (rows > 0) weights[i] = 1.0 / static_cast<double>(rows * heads);
  }
  return weights;
}

struct Tasks {
  std::vector<RelationTask> tasks;
  int64_t copies;  // of b's gradient: one for each piece of a sequence's rows
};

// One task for each head of each sequence, the longest first; where these are few, the rows are cut as well.
Tasks make_tasks(const RelationProblem& problem, const Layout& layout, bool symmetric,
                 const std::vector<double>& weights) {
  const bool many = layout.batch * problem.heads >= kManyHeads;
  const int64_t elements = problem.tokens * problem.heads * problem.student.size;
  Tasks all{{}, 1};
  for (int64_t i = 0; i < layout.batch; ++i) {
    const int64_t length = layout.length(i);
    const int64_t pieces = many ? 1 : std::max<int64_t>(1, std::min(kPieces, length / kLeastRows));
    const int64_t rows = (length + pieces - 1) / pieces;
    const int32_t* counts = layout.counts + 3 * i;
    const bool triangle = symmetric && many && counts[0] == length && length >= kLeastTriangle;
    for (int64_t head = 0; head < problem.heads; ++head)
      for (int64_t row = 0; row < length; row += rows)
        all.tasks.push_back({layout.starts[i], counts[0], counts[1], counts[2], head, row, std::min(row + rows, length),
                             triangle, static_cast<float>(weights[i]), row / rows * elements});
    all.copies = std::max(all.copies, pieces);
  }
  std::stable_sort(all.tasks.begin(), all.tasks.end(), [](const RelationTask& x, const RelationTask& y) {
    return x.source + x.target + x.pseudo > y.source + y.target + y.pseudo;
  });
  return all;
}

RelationKernels choose_kernels(const RelationProblem& problem) {
#ifdef MINILM_FAST_X86
  if (current_isa() >= Isa::kAmx && problem.teacher.bf16 && problem.student.bf16) return relation_kl_amx;
  if (current_isa() >= Isa::kAvx512) return relation_kl_avx512;
  if (current_isa() >= Isa::kAvx2) return relation_kl_avx2;
#endif
  return relation_kl_default;
}

void run(RelationKernel kernel, const RelationProblem& problem, const std::vector<RelationTask>& tasks,
         int64_t longest) {
  const size_t bytes = sizeof(float) * static_cast<size_t>(relation_scratch(problem, longest));
  run_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    kernel(problem, tasks[i], reinterpret_cast<float*>(scratch.get(bytes)));
  });
}

// In a fixed order and in double precision.
double weighted_sum(const RelationProblem& problem, const Layout& layout, const std::vector<double>& weights) {
  double loss = 0.0;
  for (int64_t i = 0; i < layout.batch; ++i) {
    double sum = 0.0;
    for (int64_t head = 0; head < problem.heads; ++head) {
      const float* rows = problem.divergence + head * problem.tokens;
      for (int64_t j = layout.starts[i]; j < layout.starts[i + 1]; ++j) sum += rows[j];
    }
    loss += sum * weights[i];
  }
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_kl(const at::Tensor& teacher_a, const Optional& teacher_b,
                                                           const at::Tensor& student_a, const Optional& student_b,
                                                           const at::Tensor& cu_seqlens, const at::Tensor& segments,
                                                           int64_t max_seqlen, double teacher_scale,
                                                           double student_scale, c10::string_view reduction) {
  RelationProblem problem = check_problem(teacher_a, teacher_b, student_a, student_b, teacher_scale, student_scale);
  const Layout layout = checked_layout(cu_seqlens, segments, max_seqlen, problem.tokens);
  const std::vector<double> weights = sequence_weights(layout, problem.heads, problem.tokens, reduction);

  const auto options = student_a.options().dtype(at::kFloat);
  at::Tensor lse_teacher = at::empty({problem.heads, problem.tokens}, options.dtype(at::kDouble));
  at::Tensor lse_student = at::empty_like(lse_teacher);
  at::Tensor divergence = at::empty({problem.heads, problem.tokens}, options);
  at::Tensor loss = at::empty({}, options);
  problem.teacher.lse = lse_teacher.data_ptr<double>();
  problem.student.lse = lse_student.data_ptr<double>();
  problem.divergence = divergence.data_ptr<float>();
  const bool symmetric = !teacher_b.has_value() && !student_b.has_value();
  const Tasks all = make_tasks(problem, layout, symmetric, weights);
  run(choose_kernels(problem).forward, problem, all.tasks, layout.longest);
  *loss.data_ptr<float>() = static_cast<float>(weighted_sum(problem, layout, weights));
  return {loss, lse_teacher, lse_student};
}

std::tuple<at::Tensor, at::Tensor> relation_kl_backward(const at::Tensor& grad, const at::Tensor& teacher_a,
                                                        const Optional& teacher_b, const at::Tensor& student_a,
                                                        const Optional& student_b, const at::Tensor& lse_teacher,
                                                        const at::Tensor& lse_student, const at::Tensor& cu_seqlens,
                                                        const at::Tensor& segments, int64_t max_seqlen,
                                                        double teacher_scale, double student_scale,
                                                        c10::string_view reduction) {
  RelationProblem problem = check_problem(teacher_a, teacher_b, student_a, student_b, teacher_scale, student_scale);
  const Layout layout = checked_layout(cu_seqlens, segments, max_seqlen, problem.tokens);
  std::vector<double> weights = sequence_weights(layout, problem.heads, problem.tokens, reduction);
  check_floats(kOp, "grad", grad, {});
  for (double& weight : weights) weight *= *grad.const_data_ptr<float>();
  check_statistics("lse_teacher", lse_teacher, problem);
  check_statistics("lse_student", lse_student, problem);
  problem.teacher.lse = lse_teacher.data_ptr<double>();
  problem.student.lse = lse_student.data_ptr<double>();

  const bool one = !student_b.has_value();
  const Tasks all = make_tasks(problem, layout, one && !teacher_b.has_value(), weights);
  const auto own = student_a.options(), wide = own.dtype(at::kFloat);
  const bool copied = all.copies > 1;
  at::Tensor grad_a = at::empty(student_a.sizes(), copied ? wide : own);
  at::Tensor grad_b = copied ? at::zeros({all.copies, problem.tokens, problem.heads, problem.student.size}, wide)
                      : one  ? at::empty({0}, own)
                             : at::empty(student_a.sizes(), own);
  problem.grad_bf16 = grad_a.scalar_type() == at::kBFloat16;
  problem.grad_a = grad_a.data_ptr();
  problem.grad_b = one && !copied ? nullptr : grad_b.data_ptr();
  run(choose_kernels(problem).backward, problem, all.tasks, layout.longest);
  if (!copied) return {grad_a, grad_b};
  grad_b = grad_b.sum(0);
  if (one) return {grad_a.add_(grad_b).to(own.dtype()), at::empty({0}, own)};
  return {grad_a.to(own.dtype()), grad_b.to(own.dtype())};
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("relation_kl", &minilm_fast::relation_kl);
  m.impl("relation_kl_backward", &minilm_fast::relation_kl_backward);
}
