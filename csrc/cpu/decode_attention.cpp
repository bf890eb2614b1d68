#include "decode_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "decode_dispatch.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "decode_attention";

// The lists behind a DecodeGroup.
struct Tail {
  std::vector<TailEntry> entries;
  std::vector<int32_t> positions;
  std::vector<float> mask;
};

void check_caches(const at::Tensor& q, const at::Tensor& source_k, const at::Tensor& source_v,
                  const at::Tensor& history_k, const at::Tensor& history_v, int64_t beams) {
  const int64_t heads = q.size(1), size = q.size(2);
  check_float(kOp, "source_k", source_k);
  check_shape(kOp, "source_k", source_k, {-1, heads, size, -1});
  const int64_t slots = source_k.size(0), capacity = source_k.size(3);
  TORCH_CHECK(capacity % 16 == 0, kOp, ": the capacity of source_k must be a multiple of 16, got ", capacity);
  check_shape(kOp, "source_v", source_v, {slots, heads, capacity, size});
  check_shape(kOp, "history_k", history_k, {slots, -1, beams, heads, size});
  check_shape(kOp, "history_v", history_v, history_k.sizes());
  check_contiguous(kOp, "source_k", source_k);
  for (const auto& [name, cache] : {std::pair<const char*, const at::Tensor&>{"source_v", source_v},
                                    {"history_k", history_k},
                                    {"history_v", history_v}}) {
    check_dtype(kOp, name, cache, {source_k.scalar_type()});
    check_contiguous(kOp, name, cache);
  }
}

// Everything a bad value of which would make the kernel read or write where it must not.
void check_examples(const at::Tensor& slots, const at::Tensor& steps, const at::Tensor& source_lengths,
                    const at::Tensor& ancestry, int64_t capacity) {
  const int64_t examples = slots.size(0), slot_count = source_lengths.size(0);
  const int64_t beams = ancestry.size(1), history = ancestry.size(2);
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  const int32_t* step = steps.const_data_ptr<int32_t>();
  const int32_t* lengths = source_lengths.const_data_ptr<int32_t>();
  std::vector<char> used(slot_count);
  for (int64_t e = 0; e < examples; ++e) {
    TORCH_CHECK(slot[e] >= 0 && slot[e] < slot_count, kOp, ": slots[", e, "] is ", slot[e], ", there are ", slot_count,
                " slots");
    TORCH_CHECK(!used[slot[e]], kOp, ": slots holds ", slot[e], " twice");
    used[slot[e]] = 1;
    TORCH_CHECK(step[e] >= 0 && step[e] < history, kOp, ": steps[", e, "] is ", step[e], ", the history holds ",
                history);
    TORCH_CHECK(lengths[slot[e]] >= 0 && lengths[slot[e]] <= capacity, kOp, ": source_lengths[", slot[e], "] is ",
                lengths[slot[e]], ", source_k holds ", capacity);
    const int32_t* ancestors = ancestry.const_data_ptr<int32_t>() + e * beams * history;
    for (int64_t b = 0; b < beams; ++b)
      for (int64_t j = 0; j < step[e]; ++j) {
        const int32_t beam = ancestors[b * history + j];
        TORCH_CHECK(beam >= 0 && beam < beams, kOp, ": ancestry[", e, ", ", b, ", ", j, "] is ", beam, ", there are ",
                    beams, " beams");
      }
  }
}

// Lists what the rows of a group see beyond the source: the history, each entry once however many of the group's
// hypotheses descend from it, then row 0 and row 1 of this step.
void list_tail(DecodeGroup& group, const int32_t* ancestors, int64_t history, int64_t rows, Tail& tail) {
  const int64_t beams = group.beam_end - group.beam_begin;
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  auto add = [&](int64_t step, int64_t beam, int64_t row, int64_t position) {
    tail.entries.push_back({static_cast<int32_t>(step), static_cast<int32_t>(beam), static_cast<int32_t>(row)});
    tail.positions.push_back(static_cast<int32_t>(position));
  };
  for (int64_t j = 0; j < group.step; ++j) {
    const size_t begin = tail.entries.size();
    for (int64_t b = group.beam_begin; b < group.beam_end; ++b) {
      const int32_t beam = ancestors[b * history + j];
      const bool listed = std::any_of(tail.entries.begin() + begin, tail.entries.end(),
                                      [&](const TailEntry& entry) { return entry.beam == beam; });
      if (!listed) add(j, beam, -1, j);
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t b = group.beam_begin; b < group.beam_end; ++b) add(group.step, b, row, group.step + row);

  group.tail_count = static_cast<int64_t>(tail.entries.size());
  group.tail_stride = (group.tail_count + 15) / 16 * 16;
  tail.mask.assign(beams * rows * group.tail_stride, kHidden);
  for (int64_t b = 0; b < beams; ++b)
    for (int64_t row = 0; row < rows; ++row) {
      float* mask = tail.mask.data() + (b * rows + row) * group.tail_stride;
      const int32_t* own = ancestors + (group.beam_begin + b) * history;
      for (int64_t i = 0; i < group.tail_count; ++i) {
        const TailEntry& entry = tail.entries[i];
        const bool sees =
            entry.row < 0 ? own[entry.step] == entry.beam : entry.beam == group.beam_begin + b && entry.row <= row;
        if (sees) mask[i] = 0.0f;
      }
    }
  group.tail = tail.entries.data();
  group.tail_positions = tail.positions.data();
  group.tail_mask = tail.mask.data();
}

// Cuts the beams of each example into groups of nearly equal size whose rows fit a tile.
std::vector<DecodeGroup> make_groups(const DecodeProblem& problem, const at::Tensor& slots, const at::Tensor& steps,
                                     const at::Tensor& source_lengths, int tile_rows) {
  const int64_t most = std::max<int64_t>(1, tile_rows / problem.rows);
  const int64_t pieces = (problem.beams + most - 1) / most;
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  const int32_t* step = steps.const_data_ptr<int32_t>();
  const int32_t* lengths = source_lengths.const_data_ptr<int32_t>();
  std::vector<DecodeGroup> groups;
  for (int64_t e = 0; e < slots.size(0); ++e)
    for (int64_t i = 0; i < pieces; ++i) {
      DecodeGroup group{};
      group.example = e;
      group.slot = slot[e];
      group.length = lengths[slot[e]];
      group.step = step[e];
      group.beam_begin = problem.beams * i / pieces;
      group.beam_end = problem.beams * (i + 1) / pieces;
      groups.push_back(group);
    }
  return groups;
}

void check_rows(const char* name, const at::Tensor& x, const at::Tensor& q) {
  check_dtype(kOp, name, x, {q.scalar_type()});
  check_shape(kOp, name, x, q.sizes());
  check_rows_contiguous(kOp, name, x);
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& source_k,
                            const at::Tensor& source_v, const at::Tensor& source_lengths, at::Tensor& history_k,
                            at::Tensor& history_v, const at::Tensor& ancestry, const at::Tensor& slots,
                            const at::Tensor& steps, int64_t rows, double scale,
                            const std::optional<at::Tensor>& relative_bias) {
  check_float(kOp, "q", q);
  check_head_size(kOp, q);
  check_rows("q", q, q);
  check_rows("k", k, q);
  check_rows("v", v, q);
  TORCH_CHECK(rows == 1 || rows == 2, kOp, ": rows must be 1 or 2, got ", rows);
  const int32_t* ancestors = check_ints(kOp, "ancestry", ancestry, {-1, -1, -1});
  const int64_t examples = ancestry.size(0), beams = ancestry.size(1);
  TORCH_CHECK(q.size(0) == examples * beams * rows, kOp, ": q must have ", examples * beams * rows,
              " rows for ancestry ", ancestry.sizes(), " and rows = ", rows, ", got ", q.size(0));
  check_caches(q, source_k, source_v, history_k, history_v, beams);
  check_ints(kOp, "source_lengths", source_lengths, {source_k.size(0)});
  check_ints(kOp, "slots", slots, {examples});
  check_ints(kOp, "steps", steps, {examples});
  check_shape(kOp, "ancestry", ancestry, {examples, beams, history_k.size(1)});
  check_examples(slots, steps, source_lengths, ancestry, source_k.size(3));

  at::Tensor out = at::empty(q.sizes(), q.options());
  DecodeProblem problem{};
  problem.q = q.const_data_ptr();
  problem.k = k.const_data_ptr();
  problem.v = v.const_data_ptr();
  problem.out = out.data_ptr();
  problem.bf16 = q.scalar_type() == at::kBFloat16;
  problem.q_row = q.stride(0);
  problem.q_head = q.stride(1);
  problem.k_row = k.stride(0);
  problem.k_head = k.stride(1);
  problem.v_row = v.stride(0);
  problem.v_head = v.stride(1);
  problem.source_k = source_k.const_data_ptr();
  problem.source_v = source_v.const_data_ptr();
  problem.history_k = history_k.data_ptr();
  problem.history_v = history_v.data_ptr();
  problem.cache_bf16 = source_k.scalar_type() == at::kBFloat16;
  problem.heads = q.size(1);
  problem.size = q.size(2);
  problem.beams = beams;
  problem.rows = rows;
  problem.source_capacity = source_k.size(3);
  problem.history_capacity = history_k.size(1);
  problem.scale = scale;
  if (relative_bias.has_value()) {
    problem.distance_limit = check_relative_bias(kOp, *relative_bias, problem.heads);
    problem.relative_bias = relative_bias->const_data_ptr<float>();
  }
  if (q.numel() == 0) return out;

  const DecodeKernels kernels = decode_kernels(problem);
  std::vector<DecodeGroup> groups = make_groups(problem, slots, steps, source_lengths, kernels.tile_rows);
  const int64_t count = static_cast<int64_t>(groups.size());
  std::vector<Tail> tails(count);
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      list_tail(groups[i], ancestors + groups[i].example * beams * problem.history_capacity, problem.history_capacity,
                rows, tails[i]);
  });
  int64_t keys = 0;
  for (const DecodeGroup& group : groups) keys = std::max(keys, group.length + group.tail_count);
  const size_t bytes = sizeof(float) * static_cast<size_t>(kernels.scratch(problem, keys));
  // Pieces short enough to share out evenly and long enough for the prefetching to pay.
  const int64_t pairs = count * problem.heads;
  const int64_t piece = std::clamp<int64_t>(pairs / (4 * int64_t{at::get_num_threads()}), 1, problem.heads);
  run_tasks((pairs + piece - 1) / piece, [&](int64_t i) {
    static thread_local Scratch scratch;
    kernels.attend(problem, groups.data(), pairs, i * piece, std::min((i + 1) * piece, pairs),
                   reinterpret_cast<float*>(scratch.get(bytes)));
  });
  return out;
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("decode_attention", &minilm_fast::decode_attention); }
