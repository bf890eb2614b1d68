#include <algorithm>
#include <cmath>

#include "encoder.h"
#include "norm.h"

namespace minilm_fast {

Span::Span(const Encoder& encoder, Range sequences, Carver& carver)
    : e_(encoder),
      sequences_(sequences),
      first_(encoder.starts[sequences.begin]),
      tokens_(encoder.starts[sequences.end] - first_),
      projection_(carver.take<char>(tokens_ * 3 * e_.hidden * e_.element())),
      context_(carver.take<char>(tokens_ * e_.hidden * e_.element())),
      problem_(make_problem()) {}

int64_t Span::length(int64_t sequence) const {
  const int32_t* start = e_.starts + sequences_.begin + sequence;
  return start[1] - start[0];
}

AttentionProblem Span::make_problem() const {
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

int64_t Span::packed_bytes(int64_t rows) const {
  int64_t most = 0;
  const Layer& layer = e_.layers.front();
  for (const LinearLayer* linear : {&layer.projection, &layer.attention_output, &layer.intermediate, &layer.output}) {
    const bool bf16 = e_.bf16() && (linear == &layer.attention_output || linear == &layer.output);
    most = std::max(most, pack(*linear, nullptr, bf16, rows, nullptr).storage_bytes());
  }
  return most;
}

PackedRows Span::pack(const LinearLayer& layer, const void* rows, bool bf16, int64_t count, char* memory) const {
  PackedRows packed(e_.kernels, layer.weight, gemm::Source{rows, layer.weight.k, bf16}, count);
  if (memory == nullptr) return packed;
  packed.set_storage(memory);
  packed.pack(0, count);
  return packed;
}

void Span::multiply(const LinearLayer& layer, const PackedRows& rows, int64_t count, Range columns, void* out,
                    bool out_bf16, bool gelu) const {
  if (columns.size() == 0) return;
  gemm::Product product = {};
  product.weight = &layer.weight;
  product.bias = layer.bias;
  product.rows = rows.from(0);
  product.row_count = count;
  product.column = columns.begin;
  product.columns = columns.size();
  product.out = static_cast<char*>(out) + columns.begin * (out_bf16 ? 2 : 4);
  product.out_stride = layer.weight.n;
  product.out_bf16 = out_bf16;
  product.gelu = gelu;
  e_.kernels.multiply(product);
}

void Span::attend(int64_t sequence, Range heads, float* scratch) const {
  const AttentionKernel kernel = attention_kernel(e_.bf16());
  const int64_t index = sequences_.begin + sequence, begin = e_.starts[index] - first_;
  if (length(sequence) == 0) return;
  const int32_t* counts = e_.segments + 3 * index;
  for (int64_t head = heads.begin; head < heads.end; ++head)
    kernel(problem_, {begin, begin, counts[0], counts[1], counts[2], head, 0, length(sequence)}, scratch);
}

void Span::normalize(const NormLayer& norm, const float* sums, const float* residual, Range rows, float* out) const {
  NormProblem problem = {};
  problem.x = sums;
  problem.residual = residual;
  problem.out = out;
  problem.x_stride = problem.residual_stride = problem.channels = e_.hidden;
  problem.weight = norm.weight;
  problem.bias = norm.bias;
  problem.eps = e_.eps;
  norm_kernels().add_layer_norm(problem, rows.begin, rows.end);
}

}  // namespace minilm_fast
