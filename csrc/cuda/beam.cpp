#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "advance_beams_arguments.h"
#include "beam_cuda.h"
#include "cuda_operator.h"

namespace minilm_fast::cuda {
namespace {

at::Tensor ban_repeated_ngrams(const at::Tensor& tokens, const at::Tensor& lengths, int64_t n,
                               const at::Tensor& ignored) {
  constexpr char kOp[] = "ban_repeated_ngrams";
  BanNgrams p{};
  p.tokens = check_device_ints(kOp, "tokens", tokens, tokens, {-1, -1});
  p.lengths = check_device_ints(kOp, "lengths", lengths, tokens, {tokens.size(0)});
  p.ignored = check_device_ints(kOp, "ignored", ignored, tokens, {-1});
  TORCH_CHECK(n >= 1, kOp, ": n must be at least 1, got ", n);
  const Launching launching(tokens);
  at::Tensor banned = at::empty_like(tokens);
  p.banned = banned.data_ptr<int32_t>();
  p.rows = static_cast<int32_t>(tokens.size(0));
  p.capacity = static_cast<int32_t>(tokens.size(1));
  p.n = static_cast<int32_t>(std::min<int64_t>(n, std::numeric_limits<int32_t>::max()));
  p.ignored_count = static_cast<int32_t>(ignored.size(0));
  check_launch(kOp, launch_ban_repeated_ngrams(p, launching.stream()));
  return banned;
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
    check_tensor(kOp, name, x, tokens, {type});
    check_shape(kOp, name, x, shape);
    check_contiguous(kOp, name, x);
  };
  const AdvanceBeams p = advance_beams_arguments(kOp, check, candidate_scores, candidate_ids, rows, divisors, running,
                                                 frame, steps, scores, last_ids, tokens, ancestry, best_score,
                                                 best_tokens, best_length, all_ended, lengths, suppress, trace_scores,
                                                 trace_ids, trace_parents, sep, pad, min_len, early_exit, entering);
  TORCH_CHECK(p.beams <= kMostBeams, kOp, ": tokens must have at most ", kMostBeams, " beams on CUDA, got ", p.beams);
  const Launching launching(tokens);
  check_launch(kOp, launch_advance_beams(p, launching.stream()));
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("ban_repeated_ngrams", &minilm_fast::cuda::ban_repeated_ngrams);
  m.impl("advance_beams", &minilm_fast::cuda::advance_beams);
}
