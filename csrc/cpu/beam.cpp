#include <ATen/Parallel.h>
#include <ATen/ops/full_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "advance_beams_arguments.h"
#include "checks.h"

namespace minilm_fast {
namespace {

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

// What the threads of advance_beams need besides their arguments.
struct Scratch {
  std::vector<float> totals, scores;
  std::vector<int32_t> order, ids, parents, column;
};

// The best of the candidates of an example, equal ones in their order, into scores, ids and parents.
void choose(const AdvanceBeams& p, int64_t example, Scratch& scratch) {
  const int64_t row = p.row(example), count = int64_t{p.candidate_beams} * p.beams;
  std::vector<float>& totals = scratch.totals;
  for (int64_t i = 0; i < count; ++i)
    totals[i] = total_score(p, p.candidate_scores[example * count + i], row * p.beams + i / p.beams);
  std::iota(scratch.order.begin(), scratch.order.end(), 0);
  std::partial_sort(scratch.order.begin(), scratch.order.begin() + p.beams, scratch.order.end(),
                    [&](int32_t a, int32_t b) { return goes_before(totals[a], a, totals[b], b); });
  for (int b = 0; b < p.beams; ++b) {
    const int32_t chosen = scratch.order[b];
    scratch.scores[b] = totals[chosen];
    scratch.ids[b] = p.candidate_ids[example * count + chosen];
    scratch.parents[b] = chosen / p.beams;
  }
}

// Gives each hypothesis the first `count` entries of its parent; lists of `capacity` entries, one a hypothesis.
void reorder(int32_t* lists, int64_t capacity, int32_t count, Scratch& scratch) {
  const size_t beams = scratch.parents.size();
  for (int32_t i = 0; i < count; ++i) {
    for (size_t b = 0; b < beams; ++b) scratch.column[b] = lists[scratch.parents[b] * capacity + i];
    for (size_t b = 0; b < beams; ++b) lists[static_cast<int64_t>(b) * capacity + i] = scratch.column[b];
  }
}

void advance_example(const AdvanceBeams& p, int64_t example, Scratch& scratch) {
  const int64_t row = p.row(example);
  if (!p.first() && !p.running[row]) return;
  choose(p, example, scratch);
  const int32_t frame = p.first() ? 0 : p.frame[row], steps = p.first() ? p.entering : p.steps[row];
  int32_t* tokens = p.tokens + row * p.beams * p.length;
  int32_t* ancestry = p.ancestry + row * p.beams * p.history;
  if (!p.first()) {
    reorder(tokens, p.length, frame, scratch);
    reorder(ancestry, p.history, steps, scratch);
  }
  for (int b = 0; b < p.beams; ++b) {
    tokens[static_cast<int64_t>(b) * p.length + frame] = scratch.ids[b];
    // The last token has just been stored under the beam that was its parent; what comes before a target, under beam 0.
    if (p.first())
      std::fill_n(ancestry + static_cast<int64_t>(b) * p.history, steps, 0);
    else
      ancestry[static_cast<int64_t>(b) * p.history + steps] = scratch.parents[b];
    enter_hypothesis(p, row, frame, b, scratch.scores[b], scratch.ids[b], scratch.parents[b]);
  }
  const int winner = settle(p, row, scratch.scores.data(), scratch.ids.data());
  if (winner < 0) return;
  const int32_t* best = tokens + static_cast<int64_t>(winner) * p.length;
  std::copy_n(best, frame + 1, p.best_tokens + row * p.length);
}

// The kernel writes where these point.
void check_places(const char* op, const AdvanceBeams& p) {
  for (int64_t e = 0; e < p.examples; ++e) {
    const int64_t row = p.row(e);
    TORCH_CHECK(row >= 0 && row < p.all_rows, op, ": rows[", e, "] is ", row, ", there are ", p.all_rows, " rows");
    if (p.first() || !p.running[row]) continue;
    TORCH_CHECK(p.frame[row] >= 0 && p.frame[row] < p.length, op, ": frame[", row, "] is ", p.frame[row],
                ", tokens holds ", p.length);
    TORCH_CHECK(p.steps[row] >= 0 && p.steps[row] < p.history, op, ": steps[", row, "] is ", p.steps[row],
                ", ancestry holds ", p.history);
  }
}

void advance_beams(const at::Tensor& candidate_scores, const at::Tensor& candidate_ids,
                   const std::optional<at::Tensor>& rows, const at::Tensor& divisors, at::Tensor& running,
                   at::Tensor& frame, at::Tensor& steps, at::Tensor& scores, at::Tensor& last_ids, at::Tensor& tokens,
                   at::Tensor& ancestry, at::Tensor& best_score, at::Tensor& best_tokens, at::Tensor& best_length,
                   at::Tensor& all_ended, at::Tensor& lengths, at::Tensor& suppress, at::Tensor& trace_scores,
                   at::Tensor& trace_ids, at::Tensor& trace_parents, int64_t sep, int64_t pad, int64_t min_len,
                   bool early_exit, int64_t entering) {
  constexpr char kOp[] = "advance_beams";
  const auto check = [&](const char* name, const at::Tensor& x, at::ScalarType type, at::IntArrayRef shape) {
    check_dtype(kOp, name, x, {type});
    check_shape(kOp, name, x, shape);
    check_contiguous(kOp, name, x);
  };
  const AdvanceBeams p = advance_beams_arguments(kOp, check, candidate_scores, candidate_ids, rows, divisors, running,
                                                 frame, steps, scores, last_ids, tokens, ancestry, best_score,
                                                 best_tokens, best_length, all_ended, lengths, suppress, trace_scores,
                                                 trace_ids, trace_parents, sep, pad, min_len, early_exit, entering);
  check_places(kOp, p);
  at::parallel_for(0, p.examples, 16, [&](int64_t begin, int64_t end) {
    const size_t beams = p.beams, count = p.candidate_beams * beams;
    Scratch scratch = {std::vector<float>(count),   std::vector<float>(beams),   std::vector<int32_t>(count),
                       std::vector<int32_t>(beams), std::vector<int32_t>(beams), std::vector<int32_t>(beams)};
    for (int64_t e = begin; e < end; ++e) advance_example(p, e, scratch);
  });
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("ban_repeated_ngrams", &minilm_fast::ban_repeated_ngrams);
  m.impl("advance_beams", &minilm_fast::advance_beams);
}
