#include "loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "scratch.h"
#include "tasks.h"

// Logits are computed transposed, words by rows of the batch: then the vocabulary's weights are the rows of the
// product, read where they lie, and the few hidden states what is packed; sums over the vocabulary go down the columns
// without a horizontal step; and the gradient is already the left operand of the weight's gradient. Tasks are blocks of
// words. Neither they nor the order of any sum depends on the number of threads.
namespace minilm_fast {
namespace {

using gemm::Format;
using gemm::padded_k;
using gemm::panel_bytes;
using gemm::round_up;

constexpr int64_t kRowChunk = 512;     // rows of the batch at a time
constexpr int64_t kWordBlock = 128;    // words of a task
constexpr int64_t kWordChunk = 4096;   // words whose gradients are kept until the hidden states' gradient takes them
constexpr int64_t kColumnChunk = 128;  // rows of the batch whose logits are reduced while they are in the cache
constexpr int64_t kGradRows = 64;      // rows of a task of the hidden states' gradient
// Added to the elements from one row to the next: a power of two would map all rows to the same few sets of the caches.
constexpr int64_t kStrideShift = 32;
static_assert(kWordChunk % kWordBlock == 0 && kWordBlock % loss::kColumnMultiple == 0 && kWordBlock % 2 == 0, "");
static_assert(kRowChunk % kColumnChunk == 0 && kGradRows % 32 == 0, "");

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The operands, checked, and the kernels for them.
struct Operands {
  at::Tensor hidden, weight, labels;
  const float* bias;
  const int64_t* label;
  int64_t rows, channels, vocabulary;
  float smoothing, share;
  Format format;
  const gemm::Kernels& products;
  const loss::Kernels& passes;

  bool hidden_bf16() const { return format == Format::kBf16; }
  bool weight_bf16() const { return weight.scalar_type() == at::kBFloat16; }
  bool ignored(int64_t row) const { return smoothing > 0 && label[row] == 0; }
};

Operands check_operands(const char* op, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
                        const at::Tensor& labels, double smoothing) {
  check_float(op, "hidden", hidden);
  check_shape(op, "hidden", hidden, {-1, -1});
  TORCH_CHECK(hidden.size(1) > 0, op, ": hidden must have channels, got ", hidden.sizes());
  check_float(op, "weight", weight);
  check_shape(op, "weight", weight, {-1, hidden.size(1)});
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  check_dtype(op, "labels", labels, {at::kLong});
  check_shape(op, "labels", labels, {rows});
  TORCH_CHECK(smoothing >= 0 && smoothing < 1, op, ": smoothing must be at least 0 and below 1, got ", smoothing);
  TORCH_CHECK(smoothing == 0 || vocabulary > 2, op, ": smoothing needs a vocabulary of more than 2, got ", vocabulary);
  const Format format = hidden.scalar_type() == at::kBFloat16 ? Format::kBf16 : Format::kFp32;
  Operands operands = {hidden.contiguous(),
                       weight.contiguous(),
                       labels.contiguous(),
                       check_floats(op, "bias", bias, {vocabulary}),
                       nullptr,
                       rows,
                       hidden.size(1),
                       vocabulary,
                       static_cast<float>(smoothing),
                       smoothing > 0 ? static_cast<float>(smoothing / static_cast<double>(vocabulary - 2)) : 0.0f,
                       format,
                       gemm::kernels(current_isa(), format),
                       loss::kernels(current_isa())};
  operands.label = operands.labels.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < rows; ++m)
    TORCH_CHECK(operands.label[m] >= 0 && operands.label[m] < vocabulary, op, ": labels[", m, "] is ",
                operands.label[m], ", the vocabulary has ", vocabulary, " words");
  return operands;
}

const char* element(const at::Tensor& matrix, int64_t row) {
  return static_cast<const char*>(matrix.const_data_ptr()) + row * matrix.size(1) * matrix.element_size();
}

// A weight in the panels of gemm.h, in memory of its own.
struct Panels {
  at::Tensor storage;
  gemm::Weight weight;

  Panels(Format format, int64_t n, int64_t k)
      : storage(at::empty({round_up(n, gemm::kPanel) / gemm::kPanel * gemm::panel_bytes(format, k)}, at::kByte)),
        weight{format, n, k, static_cast<const char*>(storage.const_data_ptr()), nullptr, nullptr} {}

  int64_t bytes() const { return gemm::panel_bytes(weight.format, weight.k); }
  char* data() { return static_cast<char*>(storage.data_ptr()); }
};

// Rows in the form that the products read, in memory that the caller gives.
struct RowPacker {
  const gemm::Kernels& products;
  Format format;
  int64_t k;

  int64_t stride() const { return products.row_bytes(k); }
  int64_t bytes(int64_t count) const { return round_up(count, 32) * stride(); }

  gemm::Rows operator()(const gemm::Source& source, int64_t count, char* memory) const {
    if (products.reads_fp32 && !source.bf16) return {source.data, source.stride * 4, nullptr};
    products.pack_rows(source, count, k, memory, nullptr);
    return {memory, stride(), nullptr};
  }
};

// Rows [begin, begin + count) of the batch.
struct RowRange {
  int64_t begin, count;
  int64_t padded() const { return round_up(count, loss::kColumnMultiple); }
};

template <class Body>
void for_row_ranges(int64_t rows, Body body) {
  for (int64_t begin = 0; begin < rows; begin += kRowChunk) body(RowRange{begin, std::min(kRowChunk, rows - begin)});
}

// The hidden states of a range as a packed weight of `padded` features, those beyond the range 0.
Panels pack_hidden(const Operands& operands, const RowRange& range) {
  const int64_t channels = operands.channels;
  Panels panels(operands.format, range.padded(), channels);
  at::Tensor columns = at::zeros({channels, range.padded()}, operands.hidden.options());
  columns.narrow(1, 0, range.count).copy_(operands.hidden.narrow(0, range.begin, range.count).t());
  const loss::Source source = {columns.const_data_ptr(), operands.hidden_bf16(), range.padded(), channels,
                               range.padded()};
  operands.passes.pack(source, operands.format, padded_k(operands.format, channels), panels.data(), panels.bytes());
  return panels;
}

// Logits of some words and of the columns [column, column + columns), without bias.
void multiply_words(const Operands& operands, const gemm::Rows& words, int64_t count, const Panels& hidden,
                    int64_t column, int64_t columns, float* logits, int64_t stride) {
  gemm::Product product = {};
  product.weight = &hidden.weight;
  product.rows = words;
  product.row_count = count;
  product.column = column;
  product.columns = columns;
  product.out = logits;
  product.out_stride = stride;
  operands.products.multiply(product);
}

// What the blocks of words leave of the rows of a range.
struct Statistics {
  int64_t blocks, columns;
  std::vector<float> largest, exponentials, totals;  // [blocks, columns]
  std::vector<float> at_label, at_padding;           // [columns]

  Statistics(int64_t blocks, int64_t columns)
      : blocks(blocks),
        columns(columns),
        largest(blocks * columns),
        exponentials(blocks * columns),
        totals(blocks * columns),
        at_label(columns),
        at_padding(columns) {}

  double lse(int64_t column) const {
    float most = largest[column];
    for (int64_t b = 1; b < blocks; ++b) most = std::max(most, largest[b * columns + column]);
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b)
      sum += exponentials[b * columns + column] * std::exp(largest[b * columns + column] - most);
    return most + std::log(sum);
  }

  double total(int64_t column) const {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += totals[b * columns + column];
    return sum;
  }
};

// The logits of one block of words, and what they leave.
void reduce_block(const Operands& operands, const RowRange& range, const Panels& hidden, int64_t block,
                  Statistics& statistics) {
  static thread_local Scratch scratch;
  const int64_t first = block * kWordBlock, words = std::min(kWordBlock, operands.vocabulary - first);
  const RowPacker packer = {operands.products, operands.format, operands.channels};
  char* memory = scratch.get(kWordBlock * kColumnChunk * 4 + packer.bytes(kWordBlock));
  float* logits = reinterpret_cast<float*>(memory);
  const gemm::Rows rows = packer({element(operands.weight, first), operands.channels, operands.weight_bf16()}, words,
                                 memory + kWordBlock * kColumnChunk * 4);
  for (int64_t column = 0; column < range.padded(); column += kColumnChunk) {
    const int64_t columns = std::min(kColumnChunk, range.padded() - column);
    multiply_words(operands, rows, words, hidden, column, columns, logits, kColumnChunk);
    const int64_t at = block * statistics.columns + column;
    operands.passes.reduce({logits, words, columns, kColumnChunk, operands.bias + first}, &statistics.largest[at],
                           &statistics.exponentials[at], &statistics.totals[at]);
    for (int64_t c = column; c < std::min(column + columns, range.count); ++c) {
      const int64_t word = operands.label[range.begin + c] - first;
      if (word >= 0 && word < words)
        statistics.at_label[c] = logits[word * kColumnChunk + c - column] + operands.bias[first + word];
      if (block == 0) statistics.at_padding[c] = logits[c - column] + operands.bias[0];
    }
  }
}

double row_loss(const Operands& operands, const Statistics& statistics, int64_t row, int64_t column, double lse) {
  if (operands.ignored(row)) return 0.0;
  const double at_label = statistics.at_label[column];
  if (operands.smoothing == 0) return lse - at_label;
  const double smoothing = operands.smoothing, share = smoothing / static_cast<double>(operands.vocabulary - 2);
  const double others = statistics.total(column) - at_label - statistics.at_padding[column];
  const double entropy = (1 - smoothing) * std::log(1 - smoothing) + smoothing * std::log(share);
  return lse - (1 - smoothing) * at_label - share * others + entropy;
}

std::tuple<at::Tensor, at::Tensor> label_smoothed_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                                const at::Tensor& bias, const at::Tensor& labels,
                                                                double smoothing) {
  const Operands operands = check_operands("label_smoothed_cross_entropy", hidden, weight, bias, labels, smoothing);
  at::Tensor losses = at::empty({operands.rows}, bias.options()), lses = at::empty({operands.rows}, bias.options());
  float *loss = losses.data_ptr<float>(), *lse = lses.data_ptr<float>();
  for_row_ranges(operands.rows, [&](const RowRange& range) {
    const Panels panels = pack_hidden(operands, range);
    Statistics statistics(ceil_divide(operands.vocabulary, kWordBlock), range.padded());
    run_tasks(statistics.blocks, [&](int64_t block) { reduce_block(operands, range, panels, block, statistics); });
    at::parallel_for(0, range.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t row = range.begin + c;
        const double value = statistics.lse(c);
        lse[row] = static_cast<float>(value);
        loss[row] = static_cast<float>(row_loss(operands, statistics, row, c, value));
      }
    });
  });
  return {losses, lses};
}

// The gradients asked for; null where one is not.
struct Gradients {
  float* hidden;  // fp32 [rows, channels], zeroed
  float* weight;
  float* bias;
};

// Backward pass of one range of rows.
class RangeGradient {
 public:
  RangeGradient(const Operands& operands, const Gradients& gradients, const RowRange& range, const float* grad,
                const float* lse)
      : operands_(operands),
        gradients_(gradients),
        range_(range),
        panels_(pack_hidden(operands, range)),
        as_columns_(operands.format, operands.channels, range.padded()),
        lse_(range.padded(), std::numeric_limits<float>::max()),
        scale_(range.padded(), 0.0f) {
    for (int64_t c = 0; c < range.count; ++c) {
      const int64_t row = range.begin + c;
      if (operands.ignored(row)) continue;
      lse_[c] = lse[row];
      scale_[c] = grad[row];
      scale_sum_ += grad[row];
    }
    const loss::Source source = {element(operands.hidden, range.begin), operands.hidden_bf16(), operands.channels,
                                 range.count, operands.channels};
    operands.passes.pack(source, operands.format, range.padded(), as_columns_.data(), as_columns_.bytes());
  }

  void run() {
    const int64_t chunk = std::min(kWordChunk, round_up(operands_.vocabulary, kWordBlock));
    if (gradients_.hidden) kept_ = at::empty({range_.padded(), chunk + kStrideShift}, operands_.hidden.options());
    for (int64_t first = 0; first < operands_.vocabulary; first += kWordChunk) {
      const int64_t words = std::min(kWordChunk, operands_.vocabulary - first);
      Panels weights(operands_.format, operands_.channels, gradients_.hidden ? words : 0);
      run_tasks(ceil_divide(words, kWordBlock), [&](int64_t block) { word_block(first, block, words, weights); });
      if (gradients_.hidden)
        run_tasks(ceil_divide(range_.count, kGradRows), [&](int64_t block) { hidden_block(block, words, weights); });
    }
  }

 private:
  // Gradients of the logits of a block of words, then those of the words' weights and biases.
  void word_block(int64_t chunk, int64_t block, int64_t chunk_words, Panels& weights) {
    static thread_local Scratch scratch;
    const int64_t offset = block * kWordBlock, first = chunk + offset;
    const int64_t words = std::min(kWordBlock, chunk_words - offset), columns = range_.padded();
    const RowPacker word_packer = {operands_.products, operands_.format, operands_.channels};
    const RowPacker gradient_packer = {operands_.products, operands_.format, columns};
    const int64_t stride = columns + kStrideShift, logit_bytes = kWordBlock * stride * 4;
    const int64_t packed_bytes = std::max(word_packer.bytes(kWordBlock), gradient_packer.bytes(kWordBlock));
    char* memory = scratch.get(logit_bytes + packed_bytes + kWordBlock * operands_.channels * 4);
    float* logits = reinterpret_cast<float*>(memory);
    const char* words_data = element(operands_.weight, first);
    const gemm::Rows rows =
        word_packer({words_data, operands_.channels, operands_.weight_bf16()}, words, memory + logit_bytes);
    multiply_words(operands_, rows, words, panels_, 0, columns, logits, stride);

    const loss::Block logit_block = {logits, words, columns, stride, operands_.bias + first};
    differentiate(logit_block, first);
    if (gradients_.hidden) {
      keep(logit_block, offset);
      const loss::Source source = {words_data, operands_.weight_bf16(), operands_.channels, words, operands_.channels};
      const bool last = offset + words == chunk_words;
      const int64_t padded = last ? padded_k(operands_.format, chunk_words) - offset : words;
      const int64_t k_bytes = gemm::kPanel * (operands_.hidden_bf16() ? 2 : 4);
      operands_.passes.pack(source, operands_.format, padded, weights.data() + offset * k_bytes, weights.bytes());
    }
    if (gradients_.weight) {
      const gemm::Rows grads = gradient_packer({logits, stride, false}, words, memory + logit_bytes);
      weight_gradient(grads, first, words, reinterpret_cast<float*>(memory + logit_bytes + packed_bytes));
    }
  }

  // Logits to gradients; the words at which the target is not the share are corrected one by one.
  void differentiate(const loss::Block& block, int64_t first) {
    float sums[kWordBlock];
    operands_.passes.gradient(block, lse_.data(), scale_.data(), operands_.share, sums);
    if (first == 0) {
      for (int64_t c = 0; c < block.columns; ++c) block.logits[c] += operands_.share * scale_[c];
      sums[0] += operands_.share * scale_sum_;
    }
    for (int64_t c = 0; c < range_.count; ++c) {
      const int64_t word = operands_.label[range_.begin + c] - first;
      if (word < 0 || word >= block.words) continue;
      const float missing = first + word == 0 ? -1.0f : operands_.share - (1.0f - operands_.smoothing);
      block.logits[word * block.stride + c] += scale_[c] * missing;
      sums[word] += scale_[c] * missing;
    }
    if (gradients_.bias)
      for (int64_t v = 0; v < block.words; ++v)
        gradients_.bias[first + v] = sums[v] + (range_.begin > 0 ? gradients_.bias[first + v] : 0.0f);
  }

  void keep(const loss::Block& block, int64_t offset) {
    char* out = static_cast<char*>(kept_.data_ptr()) + offset * kept_.element_size();
    operands_.passes.transpose(block, out, operands_.hidden_bf16(), kept_.size(1));
  }

  void weight_gradient(const gemm::Rows& grads, int64_t first, int64_t words, float* part) {
    const int64_t channels = operands_.channels;
    float* total = gradients_.weight + first * channels;
    gemm::Product product = {};
    product.weight = &as_columns_.weight;
    product.rows = grads;
    product.row_count = words;
    product.columns = channels;
    product.out = range_.begin > 0 ? part : total;
    product.out_stride = channels;
    operands_.products.multiply(product);
    if (range_.begin > 0)
      for (int64_t i = 0; i < words * channels; ++i) total[i] += part[i];
  }

  // Adds what the words of a chunk contribute to the gradient of a block of rows.
  void hidden_block(int64_t block, int64_t words, const Panels& weights) {
    static thread_local Scratch scratch;
    const int64_t row = block * kGradRows, count = std::min(kGradRows, range_.count - row);
    const int64_t channels = operands_.channels;
    const RowPacker packer = {operands_.products, operands_.format, words};
    char* memory = scratch.get(packer.bytes(kGradRows) + kGradRows * channels * 4);
    float* part = reinterpret_cast<float*>(memory + packer.bytes(kGradRows));
    gemm::Product product = {};
    product.weight = &weights.weight;
    product.rows = packer({element(kept_, row), kept_.size(1), operands_.hidden_bf16()}, count, memory);
    product.row_count = count;
    product.columns = channels;
    product.out = part;
    product.out_stride = channels;
    operands_.products.multiply(product);
    float* total = gradients_.hidden + (range_.begin + row) * channels;
    for (int64_t i = 0; i < count * channels; ++i) total[i] += part[i];
  }

  const Operands& operands_;
  const Gradients& gradients_;
  const RowRange range_;
  Panels panels_;      // hidden states: features are rows of the batch, k are channels
  Panels as_columns_;  // the same with features and k exchanged
  std::vector<float> lse_, scale_;
  float scale_sum_ = 0.0f;
  at::Tensor kept_;  // gradients of a chunk of words [padded rows, words], in the type of the hidden states
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> label_smoothed_cross_entropy_backward(
    const at::Tensor& grad_any, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& labels, const at::Tensor& lse, double smoothing, bool hidden_grad, bool weight_grad,
    bool bias_grad) {
  constexpr char kOp[] = "label_smoothed_cross_entropy_backward";
  const Operands operands = check_operands(kOp, hidden, weight, bias, labels, smoothing);
  const at::Tensor grad = grad_any.contiguous();
  const float* grads = check_floats(kOp, "grad", grad, {operands.rows});
  const float* lses = check_floats(kOp, "lse", lse, {operands.rows});
  // The first range of rows writes the gradients of weight and bias, the others add to them.
  const auto result = [&](bool wanted, at::IntArrayRef shape, bool zeroed) {
    if (!wanted) return at::empty({0}, bias.options());
    return zeroed ? at::zeros(shape, bias.options()) : at::empty(shape, bias.options());
  };
  at::Tensor hidden_result = result(hidden_grad, hidden.sizes(), true);
  at::Tensor weight_result = result(weight_grad, weight.sizes(), operands.rows == 0);
  at::Tensor bias_result = result(bias_grad, bias.sizes(), operands.rows == 0);
  const Gradients gradients = {hidden_grad ? hidden_result.data_ptr<float>() : nullptr,
                               weight_grad ? weight_result.data_ptr<float>() : nullptr,
                               bias_grad ? bias_result.data_ptr<float>() : nullptr};
  for_row_ranges(operands.rows,
                 [&](const RowRange& range) { RangeGradient(operands, gradients, range, grads, lses).run(); });
  return {hidden_result, weight_result, bias_result};
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) {
  m.impl("label_smoothed_cross_entropy", &minilm_fast::label_smoothed_cross_entropy);
  m.impl("label_smoothed_cross_entropy_backward", &minilm_fast::label_smoothed_cross_entropy_backward);
}
