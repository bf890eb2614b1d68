#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

namespace minilm_fast {

// Checks shared by the operators. `op` and `name` (of the argument) open the message of the error.

inline void check_dtype(const char* op, const char* name, const at::Tensor& x,
                        std::initializer_list<at::ScalarType> allowed) {
  bool found = false;
  for (const at::ScalarType type : allowed) found |= x.scalar_type() == type;
  TORCH_CHECK(found && x.device().is_cpu(), op, ": ", name, " must be ", at::ArrayRef<at::ScalarType>(allowed),
              " on the CPU, got ", x.scalar_type(), " on ", x.device());
}

inline void check_float(const char* op, const char* name, const at::Tensor& x) {
  check_dtype(op, name, x, {at::kFloat, at::kBFloat16});
}

// A size of -1 stands for any.
inline void check_shape(const char* op, const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || x.size(static_cast<int64_t>(i)) == shape[i];
  TORCH_CHECK(fits, op, ": ", name, " must have the shape ", shape, " (-1: any), got ", x.sizes());
}

inline void check_contiguous(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous, got ", x.sizes(), " with strides ", x.strides());
}

inline void check_rows_contiguous(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.numel() == 0 || x.size(-1) == 1 || x.stride(-1) == 1, op, ": the last dimension of ", name,
              " must be contiguous, got strides ", x.strides());
}

inline const int32_t* check_ints(const char* op, const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  check_dtype(op, name, x, {at::kInt});
  check_shape(op, name, x, shape);
  check_contiguous(op, name, x);
  return x.const_data_ptr<int32_t>();
}

inline const float* check_floats(const char* op, const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  check_dtype(op, name, x, {at::kFloat});
  check_shape(op, name, x, shape);
  check_contiguous(op, name, x);
  return x.const_data_ptr<float>();
}

// Checks that the segments fill the sequences, and the sequences, none longer than `max_seqlen`, the tokens of `owner`;
// gives the longest length.
inline int64_t check_layout(const char* op, const at::Tensor& cu_seqlens, const at::Tensor& segments,
                            int64_t max_seqlen, int64_t tokens, const char* owner) {
  const int32_t* counts = check_ints(op, "segments", segments, {-1, 3});
  const int64_t batch = segments.size(0);
  const int32_t* starts = check_ints(op, "cu_seqlens", cu_seqlens, {batch + 1});
  TORCH_CHECK(starts[0] == 0 && starts[batch] == tokens, op, ": cu_seqlens must go from 0 to the ", tokens,
              " tokens of ", owner, ", got ", starts[0], " to ", starts[batch]);
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int32_t* c = counts + 3 * i;
    TORCH_CHECK(c[0] >= 0 && c[1] >= 0 && c[2] >= 0, op, ": segments[", i, "] holds a negative count");
    const int64_t length = int64_t{c[0]} + c[1] + c[2];
    TORCH_CHECK(int64_t{starts[i + 1]} - starts[i] == length, op, ": segments[", i, "] adds up to ", length,
                " tokens, cu_seqlens says ", int64_t{starts[i + 1]} - starts[i]);
    longest = std::max(longest, length);
  }
  TORCH_CHECK(max_seqlen >= longest, op, ": max_seqlen is ", max_seqlen, ", the longest sequence has ", longest,
              " tokens");
  return longest;
}

// Checks a table of biases by distance and gives the largest distance that it knows.
inline int64_t check_relative_bias(const char* op, const at::Tensor& bias, int64_t heads) {
  check_floats(op, "relative_bias", bias, {heads, -1});
  TORCH_CHECK(bias.size(1) % 2 == 1, op, ": relative_bias must have an odd number of columns, got ", bias.sizes());
  return bias.size(1) / 2;
}

// The seed of dropout, 0 where nothing is dropped.
inline uint64_t check_seed(const char* op, double dropout, const std::optional<at::Tensor>& seed) {
  TORCH_CHECK(dropout >= 0 && dropout < 1, op, ": dropout must be at least 0 and below 1, got ", dropout);
  if (dropout == 0) return 0;
  TORCH_CHECK(seed.has_value(), op, ": dropout needs a seed");
  check_dtype(op, "seed", *seed, {at::kLong});
  check_shape(op, "seed", *seed, {1});
  const int64_t value = *seed->const_data_ptr<int64_t>();
  TORCH_CHECK(value >= 0, op, ": seed must not be negative, got ", value);
  return static_cast<uint64_t>(value);
}

inline void check_head_size(const char* op, const at::Tensor& q) {
  TORCH_CHECK(q.dim() == 3, op, ": q must be [rows, heads, head_dim], got ", q.sizes());
  TORCH_CHECK(q.size(2) >= 1 && q.size(2) <= 128, op, ": the head size of q must be 1 to 128, got ", q.size(2));
}

}  // namespace minilm_fast
