#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "advance_beams.h"

namespace minilm_fast {

// Fills in what follows from the arguments of the operator. `check(name, x, type, shape)` raises where a tensor is not
// a contiguous one of this type and shape (-1: any) on the right device.
template <typename Check>
AdvanceBeams advance_beams_arguments(const char* op, const Check& check, const at::Tensor& candidate_scores,
                                     const at::Tensor& candidate_ids, const std::optional<at::Tensor>& rows,
                                     const at::Tensor& divisors, const at::Tensor& running, const at::Tensor& frame,
                                     const at::Tensor& steps, const at::Tensor& scores, const at::Tensor& last_ids,
                                     const at::Tensor& tokens, const at::Tensor& ancestry, const at::Tensor& best_score,
                                     const at::Tensor& best_tokens, const at::Tensor& best_length,
                                     const at::Tensor& all_ended, const at::Tensor& lengths, const at::Tensor& suppress,
                                     const at::Tensor& trace_scores, const at::Tensor& trace_ids,
                                     const at::Tensor& trace_parents, int64_t sep, int64_t pad, int64_t min_len,
                                     bool early_exit, int64_t entering) {
  AdvanceBeams p{};
  const auto pointer = [&](auto*& to, const char* name, const at::Tensor& x, at::ScalarType type,
                           at::IntArrayRef shape) {
    check(name, x, type, shape);
    using Number = std::remove_reference_t<decltype(*to)>;
    to = static_cast<Number*>(x.data_ptr());
  };
  pointer(p.tokens, "tokens", tokens, at::kInt, {-1, -1, -1});
  const int64_t all = tokens.size(0), beams = tokens.size(1), length = tokens.size(2);
  TORCH_CHECK(beams >= 1 && length >= 1 && length <= INT16_MAX && beams <= INT16_MAX, op,
              ": tokens must have from 1 to ", INT16_MAX, " beams and frames, got ", tokens.sizes());
  pointer(p.candidate_scores, "candidate_scores", candidate_scores, at::kFloat,
          {rows.has_value() ? -1 : all, entering >= 0 ? 1 : beams, beams});
  pointer(p.candidate_ids, "candidate_ids", candidate_ids, at::kInt, candidate_scores.sizes());
  const int64_t examples = candidate_scores.size(0);
  if (rows.has_value()) pointer(p.rows, "rows", *rows, at::kInt, {examples});
  pointer(p.divisors, "divisors", divisors, at::kDouble, {length});
  pointer(p.running, "running", running, at::kBool, {all});
  pointer(p.frame, "frame", frame, at::kInt, {all});
  pointer(p.steps, "steps", steps, at::kInt, {all});
  pointer(p.scores, "scores", scores, at::kFloat, {all, beams});
  pointer(p.last_ids, "last_ids", last_ids, at::kInt, {all, beams});
  pointer(p.ancestry, "ancestry", ancestry, at::kInt, {all, beams, -1});
  const int64_t history = ancestry.size(2);
  TORCH_CHECK(history >= length - 1 + std::max<int64_t>(entering, 0) && history <= INT16_MAX, op,
              ": ancestry must hold from ", length - 1 + std::max<int64_t>(entering, 0), " to ", INT16_MAX,
              " steps, got ", history);
  pointer(p.best_score, "best_score", best_score, at::kDouble, {all});
  pointer(p.best_tokens, "best_tokens", best_tokens, at::kInt, {all, length});
  pointer(p.best_length, "best_length", best_length, at::kInt, {all});
  pointer(p.all_ended, "all_ended", all_ended, at::kInt, {all});
  pointer(p.lengths, "lengths", lengths, at::kInt, {all, beams});
  pointer(p.suppress, "suppress", suppress, at::kBool, {all, beams});
  pointer(p.trace_scores, "trace_scores", trace_scores, at::kFloat, {all, -1, beams});
  const int64_t traced = trace_scores.size(1);
  TORCH_CHECK(traced == 0 || traced == length, op, ": trace_scores must hold no frame or ", length, ", got ", traced);
  pointer(p.trace_ids, "trace_ids", trace_ids, at::kInt, trace_scores.sizes());
  pointer(p.trace_parents, "trace_parents", trace_parents, at::kInt, trace_scores.sizes());
  p.all_rows = all;
  p.examples = examples;
  p.candidate_beams = static_cast<int32_t>(candidate_scores.size(1));
  p.beams = static_cast<int32_t>(beams);
  p.length = static_cast<int32_t>(length);
  p.history = static_cast<int32_t>(history);
  p.traced = static_cast<int32_t>(traced);
  p.sep = static_cast<int32_t>(sep);
  p.pad = static_cast<int32_t>(pad);
  p.min_len = static_cast<int32_t>(std::min<int64_t>(min_len, INT32_MAX));
  p.entering = static_cast<int32_t>(std::min<int64_t>(entering, history));
  p.early_exit = early_exit;
  return p;
}

}  // namespace minilm_fast
