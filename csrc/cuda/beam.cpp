#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>
#include <tuple>

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

std::tuple<at::Tensor, at::Tensor, at::Tensor> beam_step(const at::Tensor& candidate_scores,
                                                         const at::Tensor& candidate_ids, const at::Tensor& scores,
                                                         const at::Tensor& last_ids, int64_t eos) {
  constexpr char kOp[] = "beam_step";
  BeamStep p{};
  const at::Tensor& first = candidate_scores;
  p.candidate_scores = check_device_floats(kOp, "candidate_scores", candidate_scores, first, {-1, -1, -1});
  const int64_t examples = first.size(0), beams = first.size(1), width = first.size(2);
  p.candidate_ids = check_device_ints(kOp, "candidate_ids", candidate_ids, first, first.sizes());
  p.scores = check_device_floats(kOp, "scores", scores, first, {examples, beams});
  p.last_ids = check_device_ints(kOp, "last_ids", last_ids, first, {examples, beams});
  TORCH_CHECK((beams >= 1 || examples * width == 0) && beams * width <= kMostTotals, kOp,
              ": candidate_scores must have from 1 beam to ", kMostTotals, " candidates an example, got ",
              first.sizes());
  const Launching launching(first);
  at::Tensor best = at::empty({examples, width}, candidate_scores.options());
  at::Tensor ids = at::empty({examples, width}, candidate_ids.options());
  at::Tensor parents = at::empty({examples, width}, candidate_ids.options());
  p.out_scores = best.data_ptr<float>();
  p.out_ids = ids.data_ptr<int32_t>();
  p.out_parents = parents.data_ptr<int32_t>();
  p.examples = static_cast<int32_t>(examples);
  p.beams = static_cast<int32_t>(beams);
  p.width = static_cast<int32_t>(width);
  p.eos = static_cast<int32_t>(eos);
  check_launch(kOp, launch_beam_step(p, launching.stream()));
  return {best, ids, parents};
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("ban_repeated_ngrams", &minilm_fast::cuda::ban_repeated_ngrams);
  m.impl("beam_step", &minilm_fast::cuda::beam_step);
}
