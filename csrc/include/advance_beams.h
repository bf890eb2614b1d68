#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MINILM_FAST_HOST_DEVICE __host__ __device__
#else
#define MINILM_FAST_HOST_DEVICE
#endif

// What the CPU's and the GPU's advance_beams share: the rules of minilm_fast/ops/beam.py for one example.
namespace minilm_fast {

constexpr float kForbidden = -10000.0f;
// Room for the rounding of a log-probability above 0, of each step still to come, so that the early exit stays exact.
constexpr double kRounding = 1e-6;

// The arguments, all contiguous; sizes in brackets. `rows` says which row of the state an example has; without it,
// example e has row e.
struct AdvanceBeams {
  const float* candidate_scores;  // [examples, candidate_beams, beams]
  const int32_t* candidate_ids;   // [examples, candidate_beams, beams]
  const int32_t* rows;            // [examples] or null
  const double* divisors;         // [length]
  bool* running;                  // [all_rows]
  int32_t* frame;                 // [all_rows]
  int32_t* steps;                 // [all_rows]
  float* scores;                  // [all_rows, beams]
  int32_t* last_ids;              // [all_rows, beams]
  int32_t* tokens;                // [all_rows, beams, length]
  int32_t* ancestry;              // [all_rows, beams, history]
  double* best_score;             // [all_rows]
  int32_t* best_tokens;           // [all_rows, length]
  int32_t* best_length;           // [all_rows]
  int32_t* all_ended;             // [all_rows]
  int32_t* lengths;               // [all_rows, beams]
  bool* suppress;                 // [all_rows, beams]
  float* trace_scores;            // [all_rows, traced, beams], traced being 0 or length
  int32_t* trace_ids;             // [all_rows, traced, beams]
  int32_t* trace_parents;         // [all_rows, traced, beams]
  int64_t all_rows, examples;
  int32_t candidate_beams, beams, length, history, traced;
  int32_t sep, pad, min_len, entering;
  bool early_exit;

  MINILM_FAST_HOST_DEVICE bool first() const { return entering >= 0; }
  MINILM_FAST_HOST_DEVICE int64_t row(int64_t example) const { return rows == nullptr ? example : rows[example]; }
};

// The score of a candidate with that of its hypothesis. `beam` counts over the whole state.
MINILM_FAST_HOST_DEVICE inline float total_score(const AdvanceBeams& p, float candidate, int64_t beam) {
  if (p.first()) return candidate;
  return candidate + ((p.beams > 1 && p.last_ids[beam] == p.sep ? kForbidden : 0.0f) + p.scores[beam]);
}

// Descending order, NaN before everything as in torch.sort, then ascending order of indices.
MINILM_FAST_HOST_DEVICE inline bool goes_before(float a, int i, float b, int j) {
  const bool nan_a = a != a, nan_b = b != b;
  if (nan_a != nan_b) return nan_a;
  if (!nan_a && a != b) return a > b;
  return i < j;
}

// A product that is rounded before anything is added to it, whatever the compiler.
MINILM_FAST_HOST_DEVICE inline double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Whether no live hypothesis can win any more. A live score can only fall, since log-probabilities are at most 0, while
// the divisor grows to its last value. `left` steps are still to come.
MINILM_FAST_HOST_DEVICE inline bool is_decided(const AdvanceBeams& p, const float* scores, const int32_t* ids,
                                               double best, int32_t left) {
  double bound = -INFINITY;
  for (int b = 0; b < p.beams; ++b) {
    const double score = scores[b];
    if (ids[b] != p.sep && !(score <= bound)) bound = score;
  }
  bound += rounded_product(kRounding, left);
  if (bound < 0) bound /= p.divisors[p.length - 1];
  return best >= bound;
}

// Enters what was chosen, `scores` and `ids` [beams], in what is one number an example. Gives the hypothesis that is
// the best of those that have ended so far, or -1 if that is an earlier one.
MINILM_FAST_HOST_DEVICE inline int settle(const AdvanceBeams& p, int64_t row, const float* scores, const int32_t* ids) {
  const int32_t frame = p.first() ? 0 : p.frame[row];
  int32_t all_ended = p.first() ? -1 : p.all_ended[row];
  double best = p.first() ? -INFINITY : p.best_score[row];
  const bool is_open = all_ended < 0;
  bool all = true, valid = true;
  double most = -INFINITY;
  int winner = -1;
  for (int b = 0; b < p.beams; ++b) {
    const bool ended = ids[b] == p.sep;
    all &= ended;
    if (!is_open || !(ended || frame == p.length - 1)) continue;
    const double score = scores[b] / p.divisors[frame];
    valid &= score == score;
    if (!(score > most)) continue;
    most = score;
    winner = b;
  }
  if (!valid || !(most > best)) winner = -1;
  if (winner >= 0) best = most;
  if (winner >= 0 || p.first()) p.best_length[row] = winner >= 0 ? frame + 1 : 0;
  if (is_open && all) all_ended = frame;
  p.best_score[row] = best;
  p.all_ended[row] = all_ended;
  p.frame[row] = frame + 1;

  bool done = frame + 1 >= p.length;
  if (p.early_exit && p.beams > 1)
    done |= all_ended >= 0 || is_decided(p, scores, ids, best, p.length - (frame + 1));
  else if (p.early_exit)
    done |= ids[0] == p.sep || ids[0] == p.pad;
  p.running[row] = !done;
  // What may still be computed of a row that stands still must find room in the history.
  p.steps[row] = done ? 0 : p.first() ? p.entering : p.steps[row] + 1;
  return winner;
}

// What the other operators of the next step ask for in each hypothesis, and what one of a frame leaves in the traces.
MINILM_FAST_HOST_DEVICE inline void enter_hypothesis(const AdvanceBeams& p, int64_t row, int32_t frame, int beam,
                                                     float score, int32_t id, int32_t parent) {
  const int64_t place = row * p.beams + beam;
  p.scores[place] = score;
  p.last_ids[place] = id;
  p.lengths[place] = frame + 1;
  p.suppress[place] = frame + 2 <= p.min_len;
  if (p.traced == 0) return;
  const int64_t traced = (row * p.traced + frame) * p.beams + beam;
  p.trace_scores[traced] = score;
  p.trace_ids[traced] = id;
  p.trace_parents[traced] = parent;
}

}  // namespace minilm_fast
