#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "encoder.h"
#include "isa.h"
#include "packed_weight.h"
#include "scratch.h"
#include "tasks.h"

// The layers of an encoder. Many sequences are cut into groups, each of which one thread takes through all layers: what
// lies between its operators stays in the second-level cache, and threads meet only at the end. Few are shared among
// the threads.
namespace minilm_fast {
namespace {

constexpr char kOp[] = "encoder_layers";
// Tokens of a group; a longer sequence is a group of its own.
constexpr int64_t kGroupTokens = 256;
constexpr int64_t kGroupTokensFp32 = 128;
// Below so many rows a thread, threads share the columns.
constexpr int64_t kLeastRows = 32;
// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 19;
constexpr int64_t kWeightsPerLayer = 4;
constexpr int64_t kVectorsPerLayer = 8;

std::vector<Range> make_groups(const Encoder& encoder, int64_t sequences, int64_t most) {
  std::vector<Range> groups;
  for (int64_t begin = 0, end = 0; begin < sequences; begin = end) {
    do ++end;
    while (end < sequences && encoder.starts[end + 1] - encoder.starts[begin] <= most);
    groups.push_back({begin, end});
  }
  return groups;
}

template <class Team>
void run_team(const Encoder& encoder, Range sequences, int64_t slots) {
  static thread_local Scratch scratch;
  const int64_t bytes = Team(encoder, sequences, slots, nullptr).bytes();
  const Team team(encoder, sequences, slots, scratch.get(bytes));
  run_stages(slots, [&](Stages::Member& member) { team.run(member); });
}

int64_t multiply_adds(const Encoder& encoder, int64_t tokens) {
  const int64_t layer = 4 * encoder.hidden * encoder.hidden + 2 * encoder.hidden * encoder.inner;
  return tokens * layer * static_cast<int64_t>(encoder.layers.size());
}

void run_layers(const Encoder& encoder, int64_t sequences) {
  const int64_t tokens = encoder.starts[sequences];
  const int64_t threads = multiply_adds(encoder, tokens) < kSerialWork ? 1 : stage_threads();
  const int64_t group = encoder.bf16() ? kGroupTokens : kGroupTokensFp32;
  const Range all = {0, sequences};
  const int64_t columns = std::min(threads, ColumnTeam::most_slots(encoder));
  if (threads > 1 && columns > 1 && tokens < columns * kLeastRows) return run_team<ColumnTeam>(encoder, all, columns);
  const std::vector<Range> groups = make_groups(encoder, sequences, group);
  if (threads > 1 && (tokens <= threads * group || static_cast<int64_t>(groups.size()) < threads))
    return run_team<RowTeam>(encoder, all, std::min(threads, (tokens + kLeastRows - 1) / kLeastRows));
  run_tasks(static_cast<int64_t>(groups.size()), [&](int64_t i) { run_team<RowTeam>(encoder, groups[i], 1); });
}

LinearLayer open_linear(const at::Tensor& blob, const at::Tensor& bias, int64_t format, int64_t outputs,
                        int64_t inputs) {
  return {open_packed_weight(kOp, blob, format, outputs, inputs), check_floats(kOp, "bias", bias, {outputs})};
}

NormLayer open_norm(const at::Tensor& weight, const at::Tensor& bias, int64_t hidden) {
  return {check_floats(kOp, "norm weight", weight, {hidden}), check_floats(kOp, "norm bias", bias, {hidden})};
}

std::vector<Layer> open_layers(at::TensorList weights, at::TensorList vectors, int64_t format, int64_t hidden,
                               int64_t inner) {
  const int64_t count = weights.size() / kWeightsPerLayer;
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == count * kWeightsPerLayer &&
                  static_cast<int64_t>(vectors.size()) == count * kVectorsPerLayer,
              kOp, ": a layer has 4 weights and 8 vectors, got ", weights.size(), " and ", vectors.size());
  std::vector<Layer> layers;
  for (int64_t i = 0; i < count; ++i) {
    const auto w = weights.slice(i * kWeightsPerLayer, kWeightsPerLayer);
    const auto v = vectors.slice(i * kVectorsPerLayer, kVectorsPerLayer);
    layers.push_back({open_linear(w[0], v[0], format, 3 * hidden, hidden),
                      open_linear(w[1], v[1], format, hidden, hidden), open_norm(v[2], v[3], hidden),
                      open_linear(w[2], v[4], format, inner, hidden), open_linear(w[3], v[5], format, hidden, inner),
                      open_norm(v[6], v[7], hidden)});
  }
  return layers;
}

at::Tensor encoder_layers(const at::Tensor& x, at::TensorList weights, at::TensorList vectors,
                          const at::Tensor& cu_seqlens, const at::Tensor& segments, int64_t max_seqlen, int64_t heads,
                          int64_t inner, int64_t format, double eps, const std::optional<at::Tensor>& relative_bias,
                          const std::optional<at::Tensor>& position_ids) {
  const float* data = check_floats(kOp, "x", x, {-1, -1});
  const int64_t tokens = x.size(0), hidden = x.size(1);
  TORCH_CHECK(format >= 0 && format < gemm::kFormats, kOp, ": format must be 0 (fp32), 1 (bf16) or 2 (int8), got ",
              format);
  TORCH_CHECK(heads > 0 && hidden % heads == 0 && hidden / heads <= 128, kOp, ": ", hidden,
              " columns of x cannot be shared among ", heads, " heads of at most 128");
  const int64_t longest = check_layout(kOp, cu_seqlens, segments, max_seqlen, tokens, "x");
  TORCH_CHECK(relative_bias.has_value() == position_ids.has_value(), kOp,
              ": relative_bias and position_ids go together");
  at::Tensor out = at::empty(x.sizes(), x.options());
  Encoder encoder = {open_layers(weights, vectors, format, hidden, inner),
                     gemm::kernels(current_isa(), static_cast<gemm::Format>(format)),
                     static_cast<gemm::Format>(format),
                     hidden,
                     inner,
                     heads,
                     static_cast<float>(eps),
                     data,
                     out.data_ptr<float>(),
                     cu_seqlens.const_data_ptr<int32_t>(),
                     segments.const_data_ptr<int32_t>(),
                     longest,
                     nullptr,
                     0,
                     nullptr};
  if (relative_bias.has_value()) {
    encoder.distance_limit = check_relative_bias(kOp, *relative_bias, heads);
    encoder.relative_bias = relative_bias->const_data_ptr<float>();
    encoder.positions = check_ints(kOp, "position_ids", *position_ids, {tokens});
  }
  if (encoder.layers.empty()) return out.copy_(x);
  run_layers(encoder, segments.size(0));
  return out;
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("encoder_layers", &minilm_fast::encoder_layers); }
