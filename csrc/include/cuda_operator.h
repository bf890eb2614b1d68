#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <initializer_list>

#include "checks.h"
#include "cuda_dtype.h"

#ifdef MINILM_FAST_EMULATE_CUDA
#include <cuda_runtime_api.h>
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// What the operators on CUDA tensors share. The tests build them against a model of CUDA, where the tensors are the
// CPU's. Values that lie on the device (lengths, slots, steps, ids) are not checked: it would mean to wait for it.
#ifdef MINILM_FAST_EMULATE_CUDA
#define MINILM_FAST_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(minilm_fast_emulated, CPU, m)
#else
#define MINILM_FAST_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(minilm_fast, CUDA, m)
#endif

namespace minilm_fast::cuda {

#ifdef MINILM_FAST_EMULATE_CUDA
constexpr at::DeviceType kDevice = at::kCPU;
#else
constexpr at::DeviceType kDevice = at::kCUDA;
#endif

// While it lives, launches go to the tensor's device.
class Launching {
 public:
#ifdef MINILM_FAST_EMULATE_CUDA
  explicit Launching(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit Launching(const at::Tensor& x) : guard_(x.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": the kernel was not launched: ", cudaGetErrorString(error));
}

// `first` is the operator's first tensor: all are on its device.
inline void check_tensor(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first,
                         std::initializer_list<at::ScalarType> allowed) {
  bool found = false;
  for (const at::ScalarType type : allowed) found |= x.scalar_type() == type;
  TORCH_CHECK(found && x.device().type() == kDevice && x.device() == first.device(), op, ": ", name, " must be ",
              at::ArrayRef<at::ScalarType>(allowed), " on ", first.device(), ", got ", x.scalar_type(), " on ",
              x.device());
}

inline Dtype check_numbers(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first) {
  check_tensor(op, name, x, first, {at::kFloat, at::kHalf, at::kBFloat16});
  if (x.scalar_type() == at::kFloat) return Dtype::kFloat;
  return x.scalar_type() == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
}

template <typename T>
const T* check_contiguous_tensor(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first,
                                 at::ScalarType type, at::IntArrayRef shape) {
  check_tensor(op, name, x, first, {type});
  check_shape(op, name, x, shape);
  check_contiguous(op, name, x);
  return x.const_data_ptr<T>();
}

inline const int32_t* check_device_ints(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first,
                                        at::IntArrayRef shape) {
  return check_contiguous_tensor<int32_t>(op, name, x, first, at::kInt, shape);
}

inline const float* check_device_floats(const char* op, const char* name, const at::Tensor& x, const at::Tensor& first,
                                        at::IntArrayRef shape) {
  return check_contiguous_tensor<float>(op, name, x, first, at::kFloat, shape);
}

// The tensor, or a contiguous copy of it where its rows do not start at multiples of 16 bytes.
inline at::Tensor aligned_rows(const at::Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && (x.numel() == 0 || x.stride(-1) == 1);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) aligned &= x.stride(i) * x.element_size() % 16 == 0;
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

inline void check_aligned(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, op, ": ", name,
              " must start at a multiple of 16 bytes");
}

// Rows of heads of one of the sizes that kernels are compiled for.
inline void check_heads(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3, op, ": ", name, " must be [tokens, heads, head_dim], got ", x.sizes());
  TORCH_CHECK(x.size(2) == 32 || x.size(2) == 64 || x.size(2) == 128, op, ": the head size of ", name,
              " must be 32, 64 or 128 on CUDA, got ", x.size(2));
}

template <typename Problem>
void set_relative_bias(const char* op, const at::Tensor& bias, const at::Tensor& first, int64_t heads, Problem& p) {
  p.relative_bias = check_device_floats(op, "relative_bias", bias, first, {heads, -1});
  TORCH_CHECK(bias.size(1) % 2 == 1, op, ": relative_bias must have an odd number of columns, got ", bias.sizes());
  p.distance_limit = static_cast<int32_t>(bias.size(1) / 2);
}

}  // namespace minilm_fast::cuda
