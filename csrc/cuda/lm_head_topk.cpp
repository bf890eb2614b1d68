#include <ATen/ops/empty.h>

#include <limits>
#include <tuple>

#include "cuda_operator.h"
#include "lm_head_cuda.h"

namespace minilm_fast::cuda {
namespace {

constexpr char kOp[] = "lm_head_topk";

// `format` is an index into FORMATS of minilm_fast/ops/linear.py.
void check_format(const at::Tensor& weight, int64_t format) {
  const bool fits = (format == 0 && weight.scalar_type() == at::kFloat) ||
                    (format == 1 && weight.scalar_type() == at::kBFloat16) ||
                    (format == 3 && weight.scalar_type() == at::kHalf);
  TORCH_CHECK(fits, kOp, ": weight must be fp32, bf16 or fp16 as its format says, got format ", format, " and ",
              weight.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> lm_head_topk(const at::Tensor& x_any, const at::Tensor& weight,
                                                const at::Tensor& bias, int64_t vocabulary, int64_t format, int64_t k,
                                                const std::optional<at::Tensor>& banned, int64_t suppress_id,
                                                const std::optional<at::Tensor>& suppress) {
  LmHead p{};
  check_numbers(kOp, "x", x_any, x_any);
  p.dtype = check_numbers(kOp, "weight", weight, x_any);
  check_format(weight, format);
  check_shape(kOp, "x", x_any, {-1, -1});
  check_shape(kOp, "weight", weight, {vocabulary, x_any.size(1)});
  check_contiguous(kOp, "weight", weight);
  check_aligned(kOp, "weight", weight);
  const int64_t rows = x_any.size(0), features = x_any.size(1);
  TORCH_CHECK(features * weight.element_size() % kHeadChunkBytes == 0, kOp,
              ": the rows of weight must be multiples of ", kHeadChunkBytes, " bytes on CUDA, got ", features,
              " numbers");
  TORCH_CHECK(k >= 1 && k <= vocabulary && k <= kMostCandidates, kOp, ": k must be from 1 to the vocabulary's ",
              vocabulary, " and at most ", kMostCandidates, " on CUDA, got ", k);
  TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max() / 64 && vocabulary <= 65535 * int64_t{kHeadColumns}, kOp,
              ": x or weight is too large");
  p.bias = check_device_floats(kOp, "bias", bias, x_any, {vocabulary});
  if (banned.has_value() && banned->numel() > 0) {
    p.banned = check_device_ints(kOp, "banned", *banned, x_any, {rows, -1});
    p.banned_width = static_cast<int32_t>(banned->size(1));
  }
  if (suppress.has_value()) {
    p.suppress = check_contiguous_tensor<bool>(kOp, "suppress", *suppress, x_any, at::kBool, {rows});
    TORCH_CHECK(suppress_id >= 0 && suppress_id < vocabulary, kOp, ": suppress_id must be from 0 to ", vocabulary - 1,
                ", got ", suppress_id);
    p.suppress_id = static_cast<int32_t>(suppress_id);
  }

  const Launching launching(x_any);
  const at::Tensor x = x_any.to(weight.scalar_type()).contiguous();
  check_aligned(kOp, "x", x);
  const int64_t slices = head_slices(static_cast<int32_t>(vocabulary));
  const auto floats = x.options().dtype(at::kFloat), ints = x.options().dtype(at::kInt);
  at::Tensor values = at::empty({rows, k}, floats), ids = at::empty({rows, k}, ints);
  at::Tensor statistics = at::empty({2, rows, slices}, floats);
  at::Tensor candidate_logits = at::empty({rows, slices, k}, floats);
  at::Tensor candidate_ids = at::empty({rows, slices, k}, ints);
  at::Tensor exceptions = at::empty({rows, p.banned_width + 1}, floats);
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.rows = static_cast<int32_t>(rows);
  p.features = static_cast<int32_t>(features);
  p.vocabulary = static_cast<int32_t>(vocabulary);
  p.k = static_cast<int32_t>(k);
  p.values = values.data_ptr<float>();
  p.ids = ids.data_ptr<int32_t>();
  p.maxima = statistics.data_ptr<float>();
  p.sums = p.maxima + rows * slices;
  p.candidate_logits = candidate_logits.data_ptr<float>();
  p.candidate_ids = candidate_ids.data_ptr<int32_t>();
  p.exceptions = exceptions.data_ptr<float>();
  check_launch(kOp, launch_lm_head_topk(p, launching.stream()));
  return {values, ids};
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) { m.impl("lm_head_topk", &minilm_fast::cuda::lm_head_topk); }
