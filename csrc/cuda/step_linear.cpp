#include <ATen/ops/empty.h>

#include <limits>
#include <tuple>

#include "cuda_operator.h"
#include "step_cuda.h"

namespace minilm_fast::cuda {
namespace {

Dtype half_dtype(const char* op, const char* name, at::ScalarType type) {
  TORCH_CHECK(type == at::kHalf || type == at::kBFloat16, op, ": ", name, " must be fp16 or bf16 on CUDA, got ", type);
  return type == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
}

void check_row_size(const char* op, const char* name, int64_t size) {
  TORCH_CHECK(size > 0 && size % kStepChunk == 0, op, ": the rows of ", name, " must be multiples of ", kStepChunk,
              " numbers on CUDA, got ", size);
}

void check_norm_size(const char* op, const char* name, int64_t size) {
  check_row_size(op, name, size);
  TORCH_CHECK(size <= kMostStepNorm, op, ": the rows of ", name, " must have at most ", kMostStepNorm,
              " numbers on CUDA, got ", size);
}

const float* aligned_floats(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first,
                            at::IntArrayRef shape) {
  const float* data = check_device_floats(op, name, x, first, shape);
  check_aligned(op, name, x);
  return data;
}

// Rows that may be apart from one another, each in one piece that starts at a multiple of 16 bytes.
int64_t check_rows(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first, at::ScalarType type,
                   at::IntArrayRef shape) {
  check_tensor(op, name, x, first, {type});
  check_shape(op, name, x, shape);
  check_rows_contiguous(op, name, x);
  TORCH_CHECK(x.size(0) <= std::numeric_limits<int32_t>::max() / 4, op, ": ", name, " has too many rows");
  TORCH_CHECK(x.stride(0) * x.element_size() % 16 == 0, op, ": the rows of ", name,
              " must start at multiples of 16 bytes, got strides ", x.strides());
  check_aligned(op, name, x);
  return x.stride(0);
}

std::tuple<at::Tensor, at::Tensor> step_linear(const at::Tensor& x, const at::Tensor& weight,
                                               const std::optional<at::Tensor>& bias,
                                               const std::optional<at::Tensor>& residual,
                                               const std::optional<at::Tensor>& norm_weight,
                                               const std::optional<at::Tensor>& norm_bias, double eps,
                                               int64_t activation, bool wide, bool early) {
  constexpr char kOp[] = "step_linear";
  StepLinear p{};
  check_tensor(kOp, "weight", weight, x, {at::kHalf, at::kBFloat16});
  check_shape(kOp, "weight", weight, {-1, -1});
  check_contiguous(kOp, "weight", weight);
  check_aligned(kOp, "weight", weight);
  const int64_t outputs = weight.size(0), features = weight.size(1);
  check_row_size(kOp, "weight", features);
  TORCH_CHECK(outputs > 0 && outputs % kStepChunk == 0 && outputs <= std::numeric_limits<int32_t>::max() / 2, kOp,
              ": weight must have a multiple of ", kStepChunk, " rows on CUDA, got ", outputs);
  TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), kOp, ": norm_weight and norm_bias go together");
  TORCH_CHECK(activation == 0 || activation == 1, kOp, ": activation must be 0 (none) or 1 (gelu), got ", activation);
  const bool norm = norm_weight.has_value();
  p.dtype = half_dtype(kOp, "weight", weight.scalar_type());
  p.x_row = check_rows(kOp, "x", x, x, norm ? at::kFloat : weight.scalar_type(), {-1, features});
  const int64_t rows = x.size(0);
  if (bias.has_value()) p.bias = aligned_floats(kOp, "bias", *bias, x, {outputs});
  if (residual.has_value()) {
    p.residual_row = check_rows(kOp, "residual", *residual, x, weight.scalar_type(), {rows, outputs});
    p.residual = residual->const_data_ptr();
  }
  if (norm) {
    check_norm_size(kOp, "x", features);
    p.norm_weight = aligned_floats(kOp, "norm_weight", *norm_weight, x, {features});
    p.norm_bias = aligned_floats(kOp, "norm_bias", *norm_bias, x, {features});
  }

  const Launching launching(x);
  at::Tensor out = at::empty({rows, outputs}, weight.options().dtype(wide ? at::kFloat : weight.scalar_type()));
  at::Tensor normal = at::empty({norm ? rows : 0, features}, weight.options());
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.normal = normal.data_ptr();
  p.out = out.data_ptr();
  p.out_float = wide;
  p.gelu = activation == 1;
  p.early = early;
  p.rows = static_cast<int32_t>(rows);
  p.outputs = static_cast<int32_t>(outputs);
  p.features = static_cast<int32_t>(features);
  check_launch(kOp, launch_step_linear(p, launching.stream()));
  return {out, normal};
}

at::Tensor step_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                     at::ScalarType dtype, bool early) {
  constexpr char kOp[] = "step_norm";
  StepNorm p{};
  p.dtype = half_dtype(kOp, "dtype", dtype);
  p.x_row = check_rows(kOp, "x", x, x, at::kFloat, {-1, -1});
  const int64_t rows = x.size(0), channels = x.size(1);
  check_norm_size(kOp, "x", channels);
  p.weight = aligned_floats(kOp, "weight", weight, x, {channels});
  p.bias = aligned_floats(kOp, "bias", bias, x, {channels});

  const Launching launching(x);
  at::Tensor out = at::empty({rows, channels}, x.options().dtype(dtype));
  p.x = x.const_data_ptr<float>();
  p.eps = static_cast<float>(eps);
  p.out = out.data_ptr();
  p.early = early;
  p.rows = static_cast<int32_t>(rows);
  p.channels = static_cast<int32_t>(channels);
  check_launch(kOp, launch_step_norm(p, launching.stream()));
  return out;
}

at::Tensor step_embedding(const at::Tensor& last_ids, int64_t mask_id, const at::Tensor& slots, const at::Tensor& steps,
                          const at::Tensor& source_lengths, const at::Tensor& word, const at::Tensor& position,
                          const std::optional<at::Tensor>& type, int64_t type_id, const at::Tensor& weight,
                          const at::Tensor& bias, double eps, at::ScalarType dtype) {
  constexpr char kOp[] = "step_embedding";
  StepEmbedding p{};
  p.dtype = half_dtype(kOp, "dtype", dtype);
  p.last_ids = check_device_ints(kOp, "last_ids", last_ids, last_ids, {-1, -1});
  const int64_t examples = last_ids.size(0), beams = last_ids.size(1), kinds = mask_id < 0 ? 1 : 2;
  p.slots = check_device_ints(kOp, "slots", slots, last_ids, {examples});
  p.steps = check_device_ints(kOp, "steps", steps, last_ids, {examples});
  p.source_lengths = check_device_ints(kOp, "source_lengths", source_lengths, last_ids, {-1});
  p.word = aligned_floats(kOp, "word", word, last_ids, {-1, -1});
  const int64_t channels = word.size(1);
  check_norm_size(kOp, "word", channels);
  p.position = aligned_floats(kOp, "position", position, last_ids, {-1, channels});
  if (type.has_value()) {
    const float* rows = aligned_floats(kOp, "type", *type, last_ids, {-1, channels});
    TORCH_CHECK(type_id >= 0 && type_id < type->size(0), kOp, ": type_id must be from 0 to ", type->size(0) - 1,
                ", got ", type_id);
    p.type = rows + type_id * channels;
  }
  p.weight = aligned_floats(kOp, "weight", weight, last_ids, {channels});
  p.bias = aligned_floats(kOp, "bias", bias, last_ids, {channels});
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  TORCH_CHECK(last_ids.numel() <= kMost && word.size(0) <= kMost && position.size(0) <= kMost && mask_id <= kMost, kOp,
              ": last_ids or a table is too large");

  const Launching launching(last_ids);
  at::Tensor out = at::empty({last_ids.numel() * kinds, channels}, word.options().dtype(dtype));
  p.eps = static_cast<float>(eps);
  p.out = out.data_ptr();
  p.examples = static_cast<int32_t>(examples);
  p.beams = static_cast<int32_t>(beams);
  p.rows = static_cast<int32_t>(kinds);
  p.mask_id = static_cast<int32_t>(mask_id);
  p.words = static_cast<int32_t>(word.size(0));
  p.positions = static_cast<int32_t>(position.size(0));
  p.channels = static_cast<int32_t>(channels);
  check_launch(kOp, launch_step_embedding(p, launching.stream()));
  return out;
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("step_linear", &minilm_fast::cuda::step_linear);
  m.impl("step_norm", &minilm_fast::cuda::step_norm);
  m.impl("step_embedding", &minilm_fast::cuda::step_embedding);
}
