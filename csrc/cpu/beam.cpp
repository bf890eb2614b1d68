#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"

namespace minilm_fast {
namespace {

constexpr float kForbidden = -10000.0f;

bool contains(const int32_t* begin, const int32_t* end, int32_t value) { return std::find(begin, end, value) != end; }

// Writes the tokens that would complete an n-gram of the sequence once more, each once, in order of appearance.
void ban_row(const int32_t* tokens, int64_t length, int64_t n, const int32_t* ignored, const int32_t* ignored_end,
             int32_t* banned) {
  if (length < n) return;
  const int32_t* tail = n == 1 ? tokens : tokens + length - (n - 1);
  for (const int32_t* token = tail; token < tokens + length; ++token)
    if (contains(ignored, ignored_end, *token)) return;
  int32_t* end = banned;
  for (int64_t i = 0; i + n <= length; ++i) {
    const int32_t follower = tokens[i + n - 1];
    if (n > 1 && !std::equal(tokens + i, tokens + i + n - 1, tail)) continue;
    if (!contains(ignored, ignored_end, follower) && !contains(banned, end, follower)) *end++ = follower;
  }
}

at::Tensor ban_repeated_ngrams(const at::Tensor& tokens, const at::Tensor& lengths, int64_t n,
                               const at::Tensor& ignored) {
  constexpr char kOp[] = "ban_repeated_ngrams";
  const int32_t* ids = check_ints(kOp, "tokens", tokens, {-1, -1});
  const int64_t rows = tokens.size(0), capacity = tokens.size(1);
  const int32_t* counts = check_ints(kOp, "lengths", lengths, {rows});
  const int32_t* skip = check_ints(kOp, "ignored", ignored, {-1});
  TORCH_CHECK(n >= 1, kOp, ": n must be at least 1, got ", n);
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK(counts[row] >= 0 && counts[row] <= capacity, kOp, ": lengths[", row, "] is ", counts[row],
                ", tokens holds ", capacity);
  at::Tensor banned = at::full_like(tokens, -1);
  int32_t* out = banned.data_ptr<int32_t>();
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      ban_row(ids + row * capacity, counts[row], n, skip, skip + ignored.size(0), out + row * capacity);
  });
  return banned;
}

// Descending order of scores, NaN before everything as in torch.topk, then ascending order of indices.
struct Better {
  const float* scores;
  bool operator()(int32_t a, int32_t b) const {
    const bool nan_a = std::isnan(scores[a]), nan_b = std::isnan(scores[b]);
    if (nan_a != nan_b) return nan_a;
    if (!nan_a && scores[a] != scores[b]) return scores[a] > scores[b];
    return a < b;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> beam_step(const at::Tensor& candidate_scores,
                                                         const at::Tensor& candidate_ids, const at::Tensor& scores,
                                                         const at::Tensor& last_ids, int64_t eos) {
  constexpr char kOp[] = "beam_step";
  const float* candidates = check_floats(kOp, "candidate_scores", candidate_scores, {-1, -1, -1});
  const int64_t examples = candidate_scores.size(0), beams = candidate_scores.size(1), width = candidate_scores.size(2);
  const int32_t* ids = check_ints(kOp, "candidate_ids", candidate_ids, candidate_scores.sizes());
  const float* sums = check_floats(kOp, "scores", scores, {examples, beams});
  const int32_t* last = check_ints(kOp, "last_ids", last_ids, {examples, beams});
  TORCH_CHECK(beams >= 1 || examples * width == 0, kOp, ": candidate_scores must have at least one beam, got ",
              candidate_scores.sizes());

  at::Tensor best = at::empty({examples, width}, candidate_scores.options());
  at::Tensor best_ids = at::empty({examples, width}, candidate_ids.options());
  at::Tensor parents = at::empty({examples, width}, candidate_ids.options());
  float* out_scores = best.data_ptr<float>();
  int32_t* out_ids = best_ids.data_ptr<int32_t>();
  int32_t* out_parents = parents.data_ptr<int32_t>();
  at::parallel_for(0, examples, 16, [&](int64_t begin, int64_t end) {
    const int64_t count = beams * width;
    std::vector<float> totals(count);
    std::vector<int32_t> order(count);
    for (int64_t e = begin; e < end; ++e) {
      for (int64_t b = 0; b < beams; ++b) {
        const float before = (last[e * beams + b] == eos ? kForbidden : 0.0f) + sums[e * beams + b];
        for (int64_t i = 0; i < width; ++i) totals[b * width + i] = candidates[(e * beams + b) * width + i] + before;
      }
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + width, order.end(), Better{totals.data()});
      for (int64_t i = 0; i < width; ++i) {
        out_scores[e * width + i] = totals[order[i]];
        out_ids[e * width + i] = ids[e * count + order[i]];
        out_parents[e * width + i] = static_cast<int32_t>(order[i] / width);
      }
    }
  });
  return {best, best_ids, parents};
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("ban_repeated_ngrams", &minilm_fast::ban_repeated_ngrams);
  m.impl("beam_step", &minilm_fast::beam_step);
}
