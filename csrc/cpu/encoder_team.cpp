#include <algorithm>
#include <numeric>

#include "encoder.h"

namespace minilm_fast {
namespace {

using gemm::kPanel;
using gemm::round_up;

// Rows that pass through the second half of a layer together.
constexpr int64_t kRowBlock = 192;
// Rows of a matrix tile.
constexpr int64_t kTileRows = 16;

// The share of one of `count` in [0, size), in whole units.
Range share(int64_t size, int64_t unit, int64_t index, int64_t count) {
  const int64_t units = (size + unit - 1) / unit;
  return {std::min(size, units * index / count * unit), std::min(size, units * (index + 1) / count * unit)};
}

// Heads whose columns are a whole number of panels.
int64_t head_unit(const Encoder& e) { return kPanel / std::gcd(kPanel, e.hidden / e.heads); }

}  // namespace

RowTeam::RowTeam(const Encoder& encoder, Range sequences, int64_t slots, char* memory)
    : e_(encoder), carver_(memory), span_(encoder, sequences, carver_), slots_(slots) {
  share_rows();
  share_pairs();
  for (Slot& slot : slots_) {
    const int64_t block = std::min(slot.rows.size(), kRowBlock);
    slot.inner = carver_.take<char>(block * e_.inner * e_.element());
    slot.sums = carver_.take<float>(block * e_.hidden * 4);
    slot.packed = carver_.take<char>(span_.packed_bytes(block));
    slot.attention = carver_.take<float>(span_.attention_bytes());
  }
  bytes_ = carver_.used();
}

void RowTeam::share_rows() {
  const int64_t slots = static_cast<int64_t>(slots_.size());
  for (int64_t i = 0; i < slots; ++i) slots_[i].rows = share(span_.tokens(), kTileRows, i, slots);
}

// A pair costs about the square of the sequence's length, and something for each row.
void RowTeam::share_pairs() {
  constexpr int64_t kRowCost = 64;
  const int64_t slots = static_cast<int64_t>(slots_.size()), count = span_.sequences();
  const auto cost = [&](int64_t i) { return span_.length(i) * (span_.length(i) + kRowCost); };
  int64_t total = 0, done = 0, pair = 0;
  for (int64_t i = 0; i < count; ++i) total += cost(i) * e_.heads;
  for (int64_t i = 0; i < slots; ++i) {
    slots_[i].pairs.begin = pair;
    for (; pair < count * e_.heads && done * slots < total * (i + 1); ++pair) done += cost(pair / e_.heads);
    slots_[i].pairs.end = i + 1 == slots ? count * e_.heads : pair;
  }
}

template <class Step>
void RowTeam::for_each_block(Range rows, Step step) {
  for (int64_t row = rows.begin; row < rows.end; row += kRowBlock)
    step(Range{row, std::min(row + kRowBlock, rows.end)});
}

void RowTeam::run(Stages::Member& member) const {
  const float* x = span_.input();
  member.run([&](int64_t i) {
    for_each_block(slots_[i].rows, [&](Range rows) { project(e_.layers.front(), x, rows, slots_[i]); });
  });
  for (size_t layer = 0; layer < e_.layers.size(); ++layer) {
    member.run([&](int64_t i) { attend(slots_[i]); });
    member.run([&](int64_t i) {
      for_each_block(slots_[i].rows, [&](Range rows) {
        finish(e_.layers[layer], x, rows, slots_[i]);
        if (layer + 1 < e_.layers.size()) project(e_.layers[layer + 1], span_.output(), rows, slots_[i]);
      });
    });
    x = span_.output();
  }
}

void RowTeam::project(const Layer& layer, const float* x, Range rows, const Slot& slot) const {
  const PackedRows packed = span_.pack(layer.projection, x + rows.begin * e_.hidden, false, rows.size(), slot.packed);
  span_.multiply(layer.projection, packed, rows.size(), {0, 3 * e_.hidden},
                 span_.projection() + rows.begin * 3 * e_.hidden * e_.element(), e_.bf16(), false);
}

void RowTeam::attend(const Slot& slot) const {
  for (int64_t pair = slot.pairs.begin; pair < slot.pairs.end;) {
    const int64_t sequence = pair / e_.heads, head = pair % e_.heads;
    const Range heads = {head, std::min(e_.heads, head + slot.pairs.end - pair)};
    span_.attend(sequence, heads, slot.attention);
    pair += heads.size();
  }
}

// Everything after the attention; `x` is the layer's input.
void RowTeam::finish(const Layer& layer, const float* x, Range rows, const Slot& slot) const {
  const int64_t count = rows.size();
  const auto multiply = [&](const LinearLayer& linear, const void* from, bool bf16, void* to, bool to_bf16, bool gelu) {
    const PackedRows packed = span_.pack(linear, from, bf16, count, slot.packed);
    span_.multiply(linear, packed, count, {0, linear.weight.n}, to, to_bf16, gelu);
  };
  float* out = span_.output() + rows.begin * e_.hidden;
  const char* context = span_.context() + rows.begin * e_.hidden * e_.element();
  multiply(layer.attention_output, context, e_.bf16(), slot.sums, false, false);
  span_.normalize(layer.attention_norm, slot.sums, x + rows.begin * e_.hidden, {0, count}, out);
  multiply(layer.intermediate, out, false, slot.inner, e_.bf16(), true);
  multiply(layer.output, slot.inner, e_.bf16(), slot.sums, false, false);
  span_.normalize(layer.output_norm, slot.sums, out, {0, count}, out);
}

int64_t ColumnTeam::most_slots(const Encoder& e) {
  return e.hidden % kPanel == 0 ? (e.heads + head_unit(e) - 1) / head_unit(e) : 0;
}

ColumnTeam::ColumnTeam(const Encoder& encoder, Range sequences, int64_t slots, char* memory)
    : e_(encoder),
      carver_(memory),
      span_(encoder, sequences, carver_),
      inner_(carver_.take<char>(span_.tokens() * e_.inner * e_.element())),
      sums_(carver_.take<float>(span_.tokens() * e_.hidden * 4)),
      slots_(slots) {
  for (int64_t i = 0; i < slots; ++i) {
    Slot& slot = slots_[i];
    slot.rows = share(span_.tokens(), 1, i, slots);
    slot.heads = share(e_.heads, head_unit(e_), i, slots);
    slot.hidden = share(e_.hidden, kPanel, i, slots);
    slot.inner = share(e_.inner, kPanel, i, slots);
    slot.stream = carver_.take<float>(span_.tokens() * e_.hidden * 4);
    slot.packed = carver_.take<char>(span_.packed_bytes(span_.tokens()));
    slot.attention = carver_.take<float>(span_.attention_bytes());
  }
  bytes_ = carver_.used();
}

void ColumnTeam::run(Stages::Member& member) const {
  const int64_t tokens = span_.tokens();
  const Range all = {0, tokens};
  const NormLayer* before = nullptr;  // the norm that ends the layer before
  for (const Layer& layer : e_.layers) {
    const float* input = before == nullptr ? span_.input() : nullptr;
    member.run([&](int64_t i) {
      const Slot& slot = slots_[i];
      if (before != nullptr) span_.normalize(*before, sums_, slot.stream, all, slot.stream);
      attend(layer, before == nullptr ? input : slot.stream, slot);
    });
    const auto multiply = [&](const LinearLayer& linear, const void* from, bool bf16, Range columns, void* to,
                              bool to_bf16, bool gelu, const Slot& slot) {
      const PackedRows packed = span_.pack(linear, from, bf16, tokens, slot.packed);
      span_.multiply(linear, packed, tokens, columns, to, to_bf16, gelu);
    };
    member.run([&](int64_t i) {
      const Slot& slot = slots_[i];
      multiply(layer.attention_output, span_.context(), e_.bf16(), slot.hidden, sums_, false, false, slot);
    });
    member.run([&](int64_t i) {
      const Slot& slot = slots_[i];
      span_.normalize(layer.attention_norm, sums_, before == nullptr ? input : slot.stream, all, slot.stream);
      multiply(layer.intermediate, slot.stream, false, slot.inner, inner_, e_.bf16(), true, slot);
    });
    member.run([&](int64_t i) {
      const Slot& slot = slots_[i];
      multiply(layer.output, inner_, e_.bf16(), slot.hidden, sums_, false, false, slot);
    });
    before = &layer.output_norm;
  }
  member.run([&](int64_t i) {
    const Slot& slot = slots_[i];
    span_.normalize(*before, sums_, slot.stream, slot.rows, span_.output());
  });
}

// The queries, keys and values of a slot's heads, and their attention.
void ColumnTeam::attend(const Layer& layer, const float* x, const Slot& slot) const {
  const PackedRows packed = span_.pack(layer.projection, x, false, span_.tokens(), slot.packed);
  const int64_t size = e_.hidden / e_.heads;
  for (int64_t part = 0; part < 3; ++part)
    span_.multiply(layer.projection, packed, span_.tokens(),
                   {part * e_.hidden + slot.heads.begin * size, part * e_.hidden + slot.heads.end * size},
                   span_.projection(), e_.bf16(), false);
  for (int64_t sequence = 0; sequence < span_.sequences(); ++sequence)
    span_.attend(sequence, slot.heads, slot.attention);
}

}  // namespace minilm_fast
