#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "norm.h"
#include "packed_weight.h"
#include "scratch.h"
#include "tasks.h"

// The layers of an encoder, for a group of sequences at a time: what lies between its operators stays in the
// second-level cache, and threads meet only at the end.
namespace minilm_fast {
namespace {

using gemm::round_up;

constexpr char kOp[] = "encoder_layers";
// Tokens of a group; a longer sequence is a group of its own.
constexpr int64_t kGroupTokens = 256;
constexpr int64_t kGroupTokensFp32 = 128;
// Rows that pass through the second half of a layer together.
constexpr int64_t kRowBlock = 192;
constexpr int64_t kWeightsPerLayer = 4;
constexpr int64_t kVectorsPerLayer = 8;

struct LinearLayer {
  gemm::Weight weight;
  const float* bias;
};

struct NormLayer {
  const float *weight, *bias;
};

struct Layer {
  LinearLayer projection, attention_output;
  NormLayer attention_norm;
  LinearLayer intermediate, output;
  NormLayer output_norm;
};

struct Encoder {
  std::vector<Layer> layers;
  const gemm::Kernels& kernels;
  gemm::Format format;
  int64_t hidden, inner, heads;
  float eps;
  const float* x;
  float* out;
  const int32_t *starts, *segments;
  int64_t longest;
  const float* relative_bias;  // or null
  int64_t distance_limit;
  const int32_t* positions;  // or null

  // What lies between the operators of a layer, but for the residual stream, is bf16 unless the products are fp32.
  bool bf16() const { return format != gemm::Format::kFp32; }
  int64_t element() const { return bf16() ? 2 : 4; }
};

struct SequenceRange {
  int64_t begin, end;
};

// Takes one piece after the other of a block of memory; without memory it only counts.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t bytes) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(bytes, 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

class Group {
 public:
  Group(const Encoder& encoder, const SequenceRange& range, char* memory)
      : e_(encoder),
        range_(range),
        first_(encoder.starts[range.begin]),
        tokens_(encoder.starts[range.end] - first_),
        out_(encoder.out + first_ * encoder.hidden) {
    Carver carver(memory);
    const int64_t block = std::min(tokens_, kRowBlock), e = e_.element();
    projection_ = carver.take<char>(tokens_ * 3 * e_.hidden * e);
    context_ = carver.take<char>(tokens_ * e_.hidden * e);
    inner_ = carver.take<char>(block * e_.inner * e);
    sums_ = carver.take<float>(block * e_.hidden * 4);
    packed_ = carver.take<char>(packed_bytes(block));
    problem_ = make_problem();
    attention_ = carver.take<float>(4 * attention_scratch(problem_, e_.longest));
    bytes_ = carver.used();
  }

  int64_t bytes() const { return bytes_; }

  void run() {
    const float* x = e_.x + first_ * e_.hidden;
    for (const Layer& layer : e_.layers) {
      for (int64_t row = 0; row < tokens_; row += kRowBlock) project(layer, x, row, rows_from(row));
      attend();
      for (int64_t row = 0; row < tokens_; row += kRowBlock) finish(layer, x, row, rows_from(row));
      x = out_;
    }
  }

 private:
  int64_t rows_from(int64_t row) const { return std::min(kRowBlock, tokens_ - row); }

  int64_t packed_bytes(int64_t rows) const {
    return round_up(rows, PackedRows::kRowMultiple) * (e_.kernels.row_bytes(std::max(e_.hidden, e_.inner)) + 4);
  }

  AttentionProblem make_problem() const {
    AttentionProblem problem = {};
    const int64_t row = 3 * e_.hidden, part = e_.hidden * e_.element();
    problem.q = projection_;
    problem.k = projection_ + part;
    problem.v = projection_ + 2 * part;
    problem.out = context_;
    problem.bf16 = e_.bf16();
    problem.tokens = problem.queries = tokens_;
    problem.heads = e_.heads;
    problem.size = e_.hidden / e_.heads;
    problem.q_token = problem.k_token = problem.v_token = row;
    problem.q_head = problem.k_head = problem.v_head = problem.size;
    problem.scale = 1.0 / std::sqrt(static_cast<double>(problem.size));
    problem.relative_bias = e_.relative_bias;
    problem.distance_limit = e_.distance_limit;
    problem.positions = e_.positions == nullptr ? nullptr : e_.positions + first_;
    return problem;
  }

  void multiply(const LinearLayer& layer, const void* rows, bool rows_bf16, int64_t count, void* out, bool out_bf16,
                bool gelu) {
    PackedRows packed(e_.kernels, layer.weight, gemm::Source{rows, layer.weight.k, rows_bf16}, count);
    packed.set_storage(packed_);
    packed.pack(0, count);
    gemm::Product product = {};
    product.weight = &layer.weight;
    product.bias = layer.bias;
    product.rows = packed.from(0);
    product.row_count = count;
    product.columns = layer.weight.n;
    product.out = out;
    product.out_stride = layer.weight.n;
    product.out_bf16 = out_bf16;
    product.gelu = gelu;
    e_.kernels.multiply(product);
  }

  void project(const Layer& layer, const float* x, int64_t row, int64_t rows) {
    multiply(layer.projection, x + row * e_.hidden, false, rows, projection_ + row * 3 * e_.hidden * e_.element(),
             e_.bf16(), false);
  }

  void attend() {
    const AttentionKernel kernel = attention_kernel(e_.bf16());
    for (int64_t i = range_.begin; i < range_.end; ++i) {
      const int64_t begin = e_.starts[i] - first_, length = e_.starts[i + 1] - e_.starts[i];
      if (length == 0) continue;
      const int32_t* counts = e_.segments + 3 * i;
      for (int64_t head = 0; head < e_.heads; ++head)
        kernel(problem_, {begin, begin, counts[0], counts[1], counts[2], head, 0, length}, attention_);
    }
  }

  // Everything after the attention; `x` is the layer's input.
  void finish(const Layer& layer, const float* x, int64_t row, int64_t rows) {
    float* out = out_ + row * e_.hidden;
    multiply(layer.attention_output, context_ + row * e_.hidden * e_.element(), e_.bf16(), rows, sums_, false, false);
    normalize(layer.attention_norm, x + row * e_.hidden, rows, out);
    multiply(layer.intermediate, out, false, rows, inner_, e_.bf16(), true);
    multiply(layer.output, inner_, e_.bf16(), rows, sums_, false, false);
    normalize(layer.output_norm, out, rows, out);
  }

  // Of the sums and a residual, which may be the output's own memory.
  void normalize(const NormLayer& norm, const float* residual, int64_t rows, float* out) {
    NormProblem problem = {};
    problem.x = sums_;
    problem.residual = residual;
    problem.out = out;
    problem.x_stride = problem.residual_stride = problem.channels = e_.hidden;
    problem.weight = norm.weight;
    problem.bias = norm.bias;
    problem.eps = e_.eps;
    norm_kernels().add_layer_norm(problem, 0, rows);
  }

  const Encoder& e_;
  SequenceRange range_;
  int64_t first_, tokens_;
  float* out_;
  char *projection_, *context_, *inner_, *packed_;
  float *sums_, *attention_;
  AttentionProblem problem_;
  int64_t bytes_;
};

std::vector<SequenceRange> make_groups(const Encoder& encoder, int64_t sequences) {
  const int64_t total = encoder.starts[sequences], threads = at::get_num_threads();
  const int64_t most = std::min(encoder.bf16() ? kGroupTokens : kGroupTokensFp32, (total + threads - 1) / threads);
  std::vector<SequenceRange> groups;
  for (int64_t begin = 0, end = 0; begin < sequences; begin = end) {
    do ++end;
    while (end < sequences && encoder.starts[end + 1] - encoder.starts[begin] <= most);
    groups.push_back({begin, end});
  }
  return groups;
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
  const std::vector<SequenceRange> groups = make_groups(encoder, segments.size(0));
  run_tasks(static_cast<int64_t>(groups.size()), [&](int64_t i) {
    static thread_local Scratch scratch;
    const int64_t bytes = Group(encoder, groups[i], nullptr).bytes();
    Group(encoder, groups[i], scratch.get(bytes)).run();
  });
  return out;
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("encoder_layers", &minilm_fast::encoder_layers); }
