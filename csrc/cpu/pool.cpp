#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "checks.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "pool_sequences";
enum Pooling : int64_t { kMean, kCls, kMax };
// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 16;

void add(const float* row, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] += row[c];
}

// A NaN stays.
void take_largest(const float* row, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = row[c] > out[c] || row[c] != row[c] ? row[c] : out[c];
}

void divide(float divisor, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] /= divisor;
}

// Rows are those of one sequence.
void pool(const float* rows, int64_t count, int64_t channels, int64_t pooling, float* out) {
  if (count == 0) {
    std::fill(out, out + channels, 0.0f);
    return;
  }
  std::copy(rows, rows + channels, out);
  if (pooling == kCls) return;
  for (int64_t i = 1; i < count; ++i) {
    if (pooling == kMean)
      add(rows + i * channels, channels, out);
    else
      take_largest(rows + i * channels, channels, out);
  }
  if (pooling == kMean) divide(static_cast<float>(count), channels, out);
}

void normalize(int64_t channels, float* out) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= channels; c += kSums)
    for (int64_t i = 0; i < kSums; ++i) sums[i] += out[c + i] * out[c + i];
  for (; c < channels; ++c) sums[0] += out[c] * out[c];
  double square = 0.0;
  for (const float sum : sums) square += sum;
  divide(std::max(static_cast<float>(std::sqrt(square)), 1e-12f), channels, out);
}

at::Tensor pool_sequences(const at::Tensor& hidden, const at::Tensor& cu_seqlens, int64_t pooling, bool normalized) {
  const float* data = check_floats(kOp, "hidden", hidden, {-1, -1});
  const int32_t* starts = check_ints(kOp, "cu_seqlens", cu_seqlens, {-1});
  TORCH_CHECK(pooling >= kMean && pooling <= kMax, kOp, ": pooling must be 0 (mean), 1 (cls) or 2 (max), got ",
              pooling);
  const int64_t sequences = cu_seqlens.size(0) - 1, channels = hidden.size(1);
  TORCH_CHECK(sequences >= 0 && starts[0] == 0 && starts[sequences] == hidden.size(0) &&
                  std::is_sorted(starts, starts + sequences + 1),
              kOp, ": cu_seqlens must ascend from 0 to the ", hidden.size(0), " rows of hidden");
  at::Tensor out = at::empty({sequences, channels}, hidden.options());
  if (out.numel() == 0) return out;
  float* vectors = out.data_ptr<float>();
  const int64_t elements = std::max<int64_t>(1, hidden.numel() / sequences);
  at::parallel_for(0, sequences, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* vector = vectors + i * channels;
      pool(data + starts[i] * channels, starts[i + 1] - starts[i], channels, pooling, vector);
      if (normalized) normalize(channels, vector);
    }
  });
  return out;
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("pool_sequences", &minilm_fast::pool_sequences); }
