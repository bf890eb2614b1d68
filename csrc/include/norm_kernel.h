#pragma once

// The kernels behind norm_kernels_<isa>, compiled once for each instruction set. `begin` and `end` count rows.

#include "norm.h"
#include "vec.h"

namespace minilm_fast {
namespace {

struct Moments {
  float mean, rstd;
};

// LayerNorm of one row: get(d, n) gives the n <= kLanes elements at d, put(d, n, v) takes the result. The sums are
// kept in several vectors, which hides the latency and rounds less. The variance is taken around the mean.
template <class Get, class Put>
inline Moments normalize(int64_t channels, float eps, const float* weight, const float* bias, Get get, Put put) {
  Vec sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= channels; d += 4 * kLanes)
    for (int i = 0; i < 4; ++i) sums[i] += get(d + i * kLanes, kLanes);
  for (; d < channels; d += kLanes) sums[0] += get(d, channels - d);
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(channels);

  Vec squares[4] = {};
  for (d = 0; d + 4 * kLanes <= channels; d += 4 * kLanes)
    for (int i = 0; i < 4; ++i) {
      const Vec x = get(d + i * kLanes, kLanes) - mean;
      squares[i] += x * x;
    }
  for (; d < channels; d += kLanes) {
    const Vec x = first_lanes(channels - d, get(d, channels - d) - mean, Vec{});
    squares[0] += x * x;
  }
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(channels);
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);
  for (d = 0; d < channels; d += kLanes) {
    const int64_t n = channels - d;
    put(d, n, (get(d, n) - mean) * scale * load_first(weight + d, n) + load_first(bias + d, n));
  }
  return {mean, scale};
}

template <class T, class R>
inline void add_layer_norm_rows(const NormProblem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.channels;
    auto put = [&](int64_t d, int64_t n, Vec v) { store_first(out + d, v, n); };
    if (p.residual == nullptr) {
      normalize(p.channels, p.eps, p.weight, p.bias, [&](int64_t d, int64_t n) { return load_first(x + d, n); }, put);
      continue;
    }
    const R* residual = static_cast<const R*>(p.residual) + row * p.residual_stride;
    normalize(
        p.channels, p.eps, p.weight, p.bias,
        [&](int64_t d, int64_t n) { return load_first(x + d, n) + load_first(residual + d, n); }, put);
  }
}

inline void add_layer_norm(const NormProblem& p, int64_t begin, int64_t end) {
  if (p.x_bf16 && p.residual_bf16)
    add_layer_norm_rows<Bf16, Bf16>(p, begin, end);
  else if (p.x_bf16)
    add_layer_norm_rows<Bf16, float>(p, begin, end);
  else if (p.residual_bf16)
    add_layer_norm_rows<float, Bf16>(p, begin, end);
  else
    add_layer_norm_rows<float, float>(p, begin, end);
}

inline void embed_layer_norm(const EmbedProblem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* word = p.word + p.ids[row] * p.channels;
    const float* position = p.position + p.positions[row] * p.channels;
    float* out = p.out + row * p.channels;
    auto put = [&](int64_t d, int64_t n, Vec v) { store_first(out + d, v, n); };
    auto untyped = [&](int64_t d, int64_t n) { return load_first(word + d, n) + load_first(position + d, n); };
    if (p.types == nullptr) {
      normalize(p.channels, p.eps, p.weight, p.bias, untyped, put);
      continue;
    }
    const float* type = p.type + p.types[row] * p.channels;
    normalize(
        p.channels, p.eps, p.weight, p.bias,
        [&](int64_t d, int64_t n) { return untyped(d, n) + load_first(type + d, n); }, put);
  }
}

template <class T>
inline void bias_gelu_rows(const GeluProblem& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.channels;
    for (int64_t d = 0; d < p.channels; d += kLanes) {
      const int64_t n = p.channels - d;
      Vec v = load_first(x + d, n);
      if (p.bias != nullptr) v += load_first(p.bias + d, n);
      store_first(out + d, gelu(v), n);
    }
  }
}

inline void bias_gelu(const GeluProblem& p, int64_t begin, int64_t end) {
  if (p.bf16)
    bias_gelu_rows<Bf16>(p, begin, end);
  else
    bias_gelu_rows<float>(p, begin, end);
}

}  // namespace
}  // namespace minilm_fast
