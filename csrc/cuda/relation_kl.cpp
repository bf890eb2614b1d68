#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "cuda_operator.h"
#include "relation_kl_cuda.h"

namespace minilm_fast::cuda {
namespace {

constexpr char kRelation[] = "relation_kl";

// A side's tensors, whose rows are aligned; without b, a is both.
class Side {
 public:
  Side(const std::string& name, const at::Tensor& a, const std::optional<at::Tensor>& b, const at::Tensor& first,
       double scale)
      : a_(checked(name + "_a", a, a, first)),
        b_(b.has_value() ? checked(name + "_b", *b, a, first) : a_),
        scale_(scale),
        symmetric_(!b.has_value()) {}

  RelationOperands operands(const at::Tensor& lse) const {
    constexpr double kLog2OfE = 1.44269504088896340736;
    return {a_.const_data_ptr(),
            b_.const_data_ptr(),
            a_.stride(0),
            a_.stride(1),
            b_.stride(0),
            b_.stride(1),
            static_cast<int32_t>(a_.size(2)),
            static_cast<float>(scale_ * kLog2OfE),
            lse.data_ptr<double>()};
  }
  bool symmetric() const { return symmetric_; }
  const at::Tensor& a() const { return a_; }

 private:
  static at::Tensor checked(const std::string& name, const at::Tensor& x, const at::Tensor& a,
                            const at::Tensor& first) {
    check_tensor(kRelation, name.c_str(), x, first, {at::kHalf, at::kBFloat16});
    TORCH_CHECK(x.scalar_type() == first.scalar_type(), kRelation, ": ", name, " must be ", first.scalar_type(),
                ", got ", x.scalar_type());
    TORCH_CHECK(x.dim() == 3 && x.size(2) >= 8 && x.size(2) <= kMostRelationSize && x.size(2) % 8 == 0, kRelation, ": ",
                name, " must be [tokens, heads, head_dim] with a head size that is a multiple of 8, 8 to ",
                kMostRelationSize, ", got ", x.sizes());
    check_shape(kRelation, name.c_str(), x, a.sizes());
    check_shape(kRelation, name.c_str(), x, {first.size(0), first.size(1), -1});
    return aligned_rows(x);
  }

  at::Tensor a_, b_;
  double scale_;
  bool symmetric_;
};

RelationReduction parse_reduction(c10::string_view reduction) {
  if (reduction == "sum") return RelationReduction::kSum;
  if (reduction == "token_mean") return RelationReduction::kTokenMean;
  TORCH_CHECK(reduction == "batch_mean", kRelation, ": reduction must be batch_mean, token_mean or sum, got ",
              reduction);
  return RelationReduction::kBatchMean;
}

RelationKl make_problem(const Side& teacher, const Side& student, const at::Tensor& cu_seqlens,
                        const at::Tensor& segments, int64_t max_seqlen, c10::string_view reduction,
                        const at::Tensor& lse_teacher, const at::Tensor& lse_student) {
  const at::Tensor& like = student.a();
  const int64_t tokens = like.size(0), heads = like.size(1);
  RelationKl p{};
  p.dtype = like.scalar_type() == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
  p.teacher = teacher.operands(lse_teacher);
  p.student = student.operands(lse_student);
  p.segments = check_device_ints(kRelation, "segments", segments, like, {-1, 3});
  const int64_t batch = segments.size(0);
  p.cu_seqlens = check_device_ints(kRelation, "cu_seqlens", cu_seqlens, like, {batch + 1});
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(max_seqlen >= 0 && max_seqlen <= kMost && tokens <= kMost && batch <= 65535 && heads <= 65535, kRelation,
              ": the batch is too large: ", batch, " sequences of up to ", max_seqlen, " tokens, ", heads, " heads");
  p.batch = static_cast<int32_t>(batch);
  p.heads = static_cast<int32_t>(heads);
  p.max_seqlen = static_cast<int32_t>(max_seqlen);
  p.tokens = tokens;
  p.reduction = parse_reduction(reduction);
  p.symmetric = teacher.symmetric() && student.symmetric();
  return p;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_kl(
    const at::Tensor& teacher_a, const std::optional<at::Tensor>& teacher_b, const at::Tensor& student_a,
    const std::optional<at::Tensor>& student_b, const at::Tensor& cu_seqlens, const at::Tensor& segments,
    int64_t max_seqlen, double teacher_scale, double student_scale, c10::string_view reduction) {
  const Launching launching(student_a);
  const Side student("student", student_a, student_b, student_a, student_scale);
  const Side teacher("teacher", teacher_a, teacher_b, student_a, teacher_scale);
  const auto options = student_a.options().dtype(at::kDouble);
  at::Tensor lse_teacher = at::empty({student_a.size(1), student_a.size(0)}, options);
  at::Tensor lse_student = at::empty_like(lse_teacher);
  RelationKl p = make_problem(teacher, student, cu_seqlens, segments, max_seqlen, reduction, lse_teacher, lse_student);
  at::Tensor parts = at::empty({p.tokens == 0 ? 0 : p.batch, p.heads, relation_kl_blocks(p)}, options);
  p.parts = parts.data_ptr<double>();
  check_launch(kRelation, launch_relation_kl(p, launching.stream()));
  return {at::sum(parts).to(at::kFloat), lse_teacher, lse_student};
}

void check_statistics(const char* name, const at::Tensor& lse, const at::Tensor& like) {
  check_contiguous_tensor<double>(kRelation, name, lse, like, at::kDouble, {like.size(1), like.size(0)});
}

std::tuple<at::Tensor, at::Tensor> relation_kl_backward(
    const at::Tensor& grad, const at::Tensor& teacher_a, const std::optional<at::Tensor>& teacher_b,
    const at::Tensor& student_a, const std::optional<at::Tensor>& student_b, const at::Tensor& lse_teacher,
    const at::Tensor& lse_student, const at::Tensor& cu_seqlens, const at::Tensor& segments, int64_t max_seqlen,
    double teacher_scale, double student_scale, c10::string_view reduction) {
  const Launching launching(student_a);
  const Side student("student", student_a, student_b, student_a, student_scale);
  const Side teacher("teacher", teacher_a, teacher_b, student_a, teacher_scale);
  check_statistics("lse_teacher", lse_teacher, student_a);
  check_statistics("lse_student", lse_student, student_a);
  RelationKl p = make_problem(teacher, student, cu_seqlens, segments, max_seqlen, reduction, lse_teacher, lse_student);
  p.grad = check_device_floats(kRelation, "grad", grad, student_a, {});
  const auto run = [&](RelationGradient of) {
    at::Tensor result = at::empty(student_a.sizes(), student_a.options());
    p.student_grad = result.data_ptr();
    check_launch(kRelation, launch_relation_kl_backward(p, of, launching.stream()));
    return result;
  };
  if (student_b.has_value()) {
    at::Tensor of_a = run(RelationGradient::kOfA);
    return {of_a, run(RelationGradient::kOfB)};
  }
  return {run(RelationGradient::kOfBoth), at::empty({0}, student_a.options())};
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("relation_kl", &minilm_fast::cuda::relation_kl);
  m.impl("relation_kl_backward", &minilm_fast::cuda::relation_kl_backward);
}
