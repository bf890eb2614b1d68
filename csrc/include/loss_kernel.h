#pragma once

// The passes of loss.h, for whatever width the including file is compiled for.

#include <type_traits>

#include "loss.h"
#include "vec.h"

namespace minilm_fast::loss {
namespace {

constexpr float kLowest = -3.4028235e38f;

// Calls body(vectors, column) so that all columns are covered, most of them four vectors at a time.
template <class Body>
inline void for_columns(int64_t columns, Body body) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= columns; c += 4 * kLanes) body(std::integral_constant<int, 4>(), c);
  for (; c < columns; c += kLanes) body(std::integral_constant<int, 1>(), c);
}

void reduce(const Block& block, float* largest, float* exponentials, float* totals) {
  for_columns(block.columns, [&](auto vectors, int64_t c) {
    Vec most[vectors], sums[vectors], total[vectors];
    for (int i = 0; i < vectors; ++i) {
      most[i] = splat(kLowest);
      sums[i] = total[i] = Vec{};
    }
    for (int64_t v = 0; v < block.words; ++v)
      for (int i = 0; i < vectors; ++i)
        most[i] = maximum(most[i], load(block.logits + v * block.stride + c + i * kLanes) + block.bias[v]);
    for (int64_t v = 0; v < block.words; ++v)
      for (int i = 0; i < vectors; ++i) {
        const Vec logit = load(block.logits + v * block.stride + c + i * kLanes) + block.bias[v];
        sums[i] += exponential(logit - most[i]);
        total[i] += logit;
      }
    for (int i = 0; i < vectors; ++i) {
      store(largest + c + i * kLanes, most[i]);
      store(exponentials + c + i * kLanes, sums[i]);
      store(totals + c + i * kLanes, total[i]);
    }
  });
}

void gradient(const Block& block, const float* lse, const float* scale, float share, float* row_sums) {
  for (int64_t v = 0; v < block.words; ++v) {
    float* row = block.logits + v * block.stride;
    Vec sums[2] = {};
    for (int64_t c = 0; c < block.columns; c += 2 * kLanes)
      for (int i = 0; i < 2; ++i) {
        const int64_t at = c + i * kLanes;
        const Vec probability = exponential(load(row + at) + block.bias[v] - load(lse + at));
        const Vec grad = load(scale + at) * (probability - share);
        store(row + at, grad);
        sums[i] += grad;
      }
    row_sums[v] = sum(sums[0] + sums[1]);
  }
}

template <class T>
inline void transpose_as(const Block& block, T* out, int64_t out_stride) {
  Vec square[kLanes];
  // Down the words first, so that what is written fills whole cache lines.
  for (int64_t c = 0; c < block.columns; c += kLanes)
    for (int64_t v = 0; v < block.words; v += kLanes) {
      for (int i = 0; i < kLanes; ++i) square[i] = load(block.logits + (v + i) * block.stride + c);
      minilm_fast::transpose(square);
      for (int i = 0; i < kLanes; ++i) store(out + (c + i) * out_stride + v, square[i]);
    }
}

void transpose(const Block& block, void* out, bool bf16, int64_t out_stride) {
  if (bf16)
    transpose_as(block, static_cast<Bf16*>(out), out_stride);
  else
    transpose_as(block, static_cast<float*>(out), out_stride);
}

// Rounded to nearest even, in the upper half of each lane; a NaN stays a NaN.
inline BitVec round_to_bf16(Vec v) {
  const BitVec bits = reinterpret_cast<BitVec>(v);
  const BitVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : bits | 0x400000u;
}

template <class T>
inline void pack_fp32(const Source& source, const T* from, int64_t features, int64_t padded_k, float* panel) {
  for (int64_t i = 0; i < padded_k; ++i, panel += gemm::kPanel)
    for (int64_t f = 0; f < gemm::kPanel; f += kLanes) {
      const bool inside = i < source.k && f < features;
      store(panel + f, inside ? load_first(from + i * source.stride + f, features - f) : Vec{});
    }
}

// Pairs of k side by side: the first in the lower half of a lane.
template <class T>
inline void pack_bf16(const Source& source, const T* from, int64_t features, int64_t padded_k, uint32_t* panel) {
  for (int64_t i = 0; i < padded_k; i += 2, panel += gemm::kPanel)
    for (int64_t f = 0; f < gemm::kPanel; f += kLanes) {
      const auto element = [&](int64_t k) {
        const bool inside = k < source.k && f < features;
        return round_to_bf16(inside ? load_first(from + k * source.stride + f, features - f) : Vec{});
      };
      const BitVec pair = (element(i) >> 16) | (element(i + 1) & 0xffff0000u);
      std::memcpy(panel + f, &pair, sizeof(pair));
    }
}

template <class T>
inline void pack_as(const Source& source, gemm::Format format, int64_t padded_k, char* panels, int64_t panel_bytes) {
  const T* data = static_cast<const T*>(source.data);
  for (int64_t f = 0; f < source.features; f += gemm::kPanel, panels += panel_bytes) {
    if (format == gemm::Format::kBf16)
      pack_bf16(source, data + f, source.features - f, padded_k, reinterpret_cast<uint32_t*>(panels));
    else
      pack_fp32(source, data + f, source.features - f, padded_k, reinterpret_cast<float*>(panels));
  }
}

void pack(const Source& source, gemm::Format format, int64_t padded_k, char* panels, int64_t panel_bytes) {
  if (source.bf16)
    pack_as<Bf16>(source, format, padded_k, panels, panel_bytes);
  else
    pack_as<float>(source, format, padded_k, panels, panel_bytes);
}

}  // namespace
}  // namespace minilm_fast::loss
