#pragma once

// The kernels of the trained fusions behind norm_kernels_<isa>, compiled once for each instruction set.

#include "norm.h"
#include "norm_kernel.h"
#include "philox.h"
#include "vec.h"

namespace minilm_fast {
namespace {

// Writes the sum of a row, zeros beyond its channels up to a multiple of kLanes, and the factors of its dropout.
template <class T, class R>
inline void write_sum(const DropoutSum& p, const Dropout& dropout, int64_t row, float* sum, float* factors) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const R* residual = p.residual == nullptr ? nullptr : static_cast<const R*>(p.residual) + row * p.residual_stride;
  if (dropout.threshold > 0)
    for (int64_t d = 0; d < p.channels; d += kDropoutBlock)
      dropout_factors(dropout, 0, row, d / kDropoutBlock, factors + d);
  for (int64_t d = 0; d < p.channels; d += kLanes) {
    const int64_t n = p.channels - d;
    Vec v = load_first(x + d, n);
    if (p.x_bias != nullptr) v += load_first(p.x_bias + d, n);
    if (dropout.threshold > 0) v *= load(factors + d);
    if (residual != nullptr) v += load_first(residual + d, n);
    store(sum + d, v);
  }
}

template <class T, class R>
inline void dropout_norm_rows(const DropoutNormProblem& p, int64_t begin, int64_t end, float* rows) {
  const int64_t channels = p.sum.channels;
  const Dropout dropout = make_dropout(p.sum.dropout, p.sum.seed);
  float* factors = rows + (channels + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  for (int64_t row = begin; row < end; ++row) {
    write_sum<T, R>(p.sum, dropout, row, rows, factors);
    T* out = static_cast<T*>(p.out) + row * channels;
    const Moments moments = normalize(
        channels, p.eps, p.weight, p.bias, [&](int64_t d, int64_t) { return load(rows + d); },
        [&](int64_t d, int64_t n, Vec v) { store_first(out + d, v, n); });
    p.mean[row] = moments.mean;
    p.rstd[row] = moments.rstd;
  }
}

// Means over a row of g and g * normal, g being grad * weight and normal the normalised row, which takes the place of
// the sum. Adds to the sums over rows of grad * normal and of grad.
template <class T>
inline void reduce_row(const DropoutNormGradient& p, int64_t row, float* normal, float* sums, float* means) {
  const int64_t channels = p.sum.channels;
  const int64_t padded = (channels + kSumMultiple - 1) / kSumMultiple * kSumMultiple;
  const T* grad = static_cast<const T*>(p.grad) + row * channels;
  const float mean = p.mean[row], rstd = p.rstd[row];
  Vec plain[2] = {}, weighted[2] = {};
  const auto step = [&](int64_t d, int64_t n, int chain) {
    const Vec upstream = load_first(grad + d, n);
    const Vec value = (load(normal + d) - mean) * rstd;
    store(normal + d, value);
    const Vec product = upstream * value;
    store(sums + d, load(sums + d) + product);
    store(sums + padded + d, load(sums + padded + d) + upstream);
    const Vec weight = load_first(p.weight + d, n);
    plain[chain] += upstream * weight;
    weighted[chain] += product * weight;
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= channels; d += 2 * kLanes) {
    step(d, kLanes, 0);
    step(d + kLanes, kLanes, 1);
  }
  for (; d < channels; d += kLanes) step(d, channels - d, 0);
  means[0] = sum(plain[0] + plain[1]) / static_cast<float>(channels);
  means[1] = sum(weighted[0] + weighted[1]) / static_cast<float>(channels);
}

template <class T, class R>
inline void dropout_norm_backward_rows(const DropoutNormGradient& p, int64_t begin, int64_t end, float* rows,
                                       float* sums) {
  const int64_t channels = p.sum.channels;
  const Dropout dropout = make_dropout(p.sum.dropout, p.sum.seed);
  float* factors = rows + (channels + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  float* x_sums = sums + 2 * ((channels + kSumMultiple - 1) / kSumMultiple * kSumMultiple);
  for (int64_t row = begin; row < end; ++row) {
    write_sum<T, R>(p.sum, dropout, row, rows, factors);
    float means[2];
    reduce_row<T>(p, row, rows, sums, means);
    const T* grad = static_cast<const T*>(p.grad) + row * channels;
    T* x_grad = p.x_grad == nullptr ? nullptr : static_cast<T*>(p.x_grad) + row * channels;
    R* residual_grad = p.residual_grad == nullptr ? nullptr : static_cast<R*>(p.residual_grad) + row * channels;
    for (int64_t d = 0; d < channels; d += kLanes) {
      const int64_t n = channels - d;
      Vec v = load_first(grad + d, n) * load_first(p.weight + d, n);
      v = (v - means[0] - load(rows + d) * means[1]) * p.rstd[row];
      if (residual_grad != nullptr) store_first(residual_grad + d, v, n);
      if (dropout.threshold > 0) v *= load(factors + d);
      if (x_grad != nullptr) store_first(x_grad + d, v, n);
      if (p.sum.x_bias != nullptr) store(x_sums + d, load(x_sums + d) + v);
    }
  }
}

inline void dropout_norm(const DropoutNormProblem& p, int64_t begin, int64_t end, float* rows) {
  if (p.sum.x_bf16 && p.sum.residual_bf16)
    dropout_norm_rows<Bf16, Bf16>(p, begin, end, rows);
  else if (p.sum.x_bf16)
    dropout_norm_rows<Bf16, float>(p, begin, end, rows);
  else if (p.sum.residual_bf16)
    dropout_norm_rows<float, Bf16>(p, begin, end, rows);
  else
    dropout_norm_rows<float, float>(p, begin, end, rows);
}

inline void dropout_norm_backward(const DropoutNormGradient& p, int64_t begin, int64_t end, float* rows, float* sums) {
  if (p.sum.x_bf16 && p.sum.residual_bf16)
    dropout_norm_backward_rows<Bf16, Bf16>(p, begin, end, rows, sums);
  else if (p.sum.x_bf16)
    dropout_norm_backward_rows<Bf16, float>(p, begin, end, rows, sums);
  else if (p.sum.residual_bf16)
    dropout_norm_backward_rows<float, Bf16>(p, begin, end, rows, sums);
  else
    dropout_norm_backward_rows<float, float>(p, begin, end, rows, sums);
}

template <class T>
inline void bias_gelu_backward_rows(const GeluGradient& p, int64_t begin, int64_t end, float* sums) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* grad = static_cast<const T*>(p.grad) + row * p.channels;
    T* x_grad = static_cast<T*>(p.x_grad) + row * p.channels;
    for (int64_t d = 0; d < p.channels; d += kLanes) {
      const int64_t n = p.channels - d;
      Vec v = load_first(x + d, n);
      if (p.bias != nullptr) v += load_first(p.bias + d, n);
      v = load_first(grad + d, n) * gelu_derivative(v);
      store_first(x_grad + d, v, n);
      if (p.bias != nullptr) store(sums + d, load(sums + d) + v);
    }
  }
}

inline void bias_gelu_backward(const GeluGradient& p, int64_t begin, int64_t end, float* sums) {
  if (p.bf16)
    bias_gelu_backward_rows<Bf16>(p, begin, end, sums);
  else
    bias_gelu_backward_rows<float>(p, begin, end, sums);
}

}  // namespace
}  // namespace minilm_fast
