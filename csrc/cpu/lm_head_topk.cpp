#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "checks.h"
#include "lm_head.h"
#include "packed_weight.h"
#include "scratch.h"
#include "tasks.h"

// The vocabulary is cut into blocks and the rows into chunks, so that the logits of one block and chunk stay in the
// second-level cache; nothing else of them is ever kept than each block's maximum and sum of exponentials and the best
// candidates of each row. The blocks do not depend on the number of rows or threads, nor does the order in which
// they are combined.
namespace minilm_fast {
namespace {

constexpr int64_t kVocabularyBlock = 512;
constexpr int64_t kRowChunk = 160;
constexpr int64_t kScanStep = 64;
constexpr int64_t kPackRows = 4 * PackedRows::kRowMultiple;
static_assert(kRowChunk % PackedRows::kRowMultiple == 0, "chunks of packed rows");
constexpr float kForbidden = -10000.0f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float logit;
  int32_t id;
  bool operator<(const Candidate& other) const {  // better comes first
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

// Ids of each row that are not candidates as they are, ascending, with their logits: the banned and the suppressed.
struct Exceptions {
  std::vector<int32_t> ids;
  std::vector<float> logits;
  std::vector<int64_t> starts;

  bool contains(int64_t row, int32_t id) const {
    return std::binary_search(ids.begin() + starts[row], ids.begin() + starts[row + 1], id);
  }
};

Exceptions list_exceptions(int64_t rows, int64_t vocab_size, const at::Tensor& banned, int32_t suppress_id,
                           const bool* suppress) {
  Exceptions result;
  result.starts.reserve(rows + 1);
  result.starts.push_back(0);
  const int64_t width = banned.defined() ? banned.size(1) : 0;
  const int32_t* data = width ? banned.const_data_ptr<int32_t>() : nullptr;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t start = result.starts.back();
    for (int64_t j = 0; j < width; ++j) {
      const int32_t id = data[m * width + j];
      TORCH_CHECK(id < vocab_size, "lm_head_topk: banned holds the id ", id, ", beyond the vocabulary of ", vocab_size);
      if (id >= 0) result.ids.push_back(id);
    }
    if (suppress && suppress[m]) result.ids.push_back(suppress_id);
    std::sort(result.ids.begin() + start, result.ids.end());
    result.ids.erase(std::unique(result.ids.begin() + start, result.ids.end()), result.ids.end());
    result.starts.push_back(static_cast<int64_t>(result.ids.size()));
  }
  result.logits.resize(result.ids.size());
  return result;
}

// The best candidates of some rows in some blocks, each row's kept as a heap with the worst on top.
struct Partial {
  int64_t row, row_count, k;
  std::vector<Candidate> heaps;
  std::vector<int64_t> sizes;
  std::vector<int64_t> next_exception;  // of each row: the first one not yet passed

  Partial(const Exceptions& exceptions, int64_t row, int64_t row_count, int64_t k)
      : row(row),
        row_count(row_count),
        k(k),
        heaps(row_count * k),
        sizes(row_count),
        next_exception(exceptions.starts.begin() + row, exceptions.starts.begin() + row + row_count) {}

  Candidate* begin(int64_t m) { return heaps.data() + (m - row) * k; }
  int64_t& size(int64_t m) { return sizes[m - row]; }

  void offer(int64_t m, Candidate candidate) {
    Candidate* heap = begin(m);
    int64_t& count = size(m);
    if (count == k) {
      if (!(candidate < heap[0])) return;
      std::pop_heap(heap, heap + k);
      heap[k - 1] = candidate;
    } else {
      heap[count++] = candidate;
    }
    std::push_heap(heap, heap + count);
  }
};

struct Head {
  const gemm::Kernels& product_kernels;
  const lm_head::Kernels& scan_kernels;
  const gemm::Weight& weight;
  const float* bias;
  const PackedRows& rows;
  int64_t row_count, k;
  Exceptions exceptions;
  std::vector<float> maxima, sums;  // [blocks, row_count]

  int64_t blocks() const { return (weight.n + kVocabularyBlock - 1) / kVocabularyBlock; }

  // Blocks come in ascending order, though not all to the same `best`.
  void scan(int64_t block, Partial& best) {
    static thread_local Scratch scratch;
    float* logits = reinterpret_cast<float*>(scratch.get(kRowChunk * kVocabularyBlock * sizeof(float)));
    const int64_t column = block * kVocabularyBlock;
    const int64_t columns = std::min(kVocabularyBlock, weight.n - column);
    for (int64_t row = best.row; row < best.row + best.row_count; row += kRowChunk) {
      const int64_t count = std::min(kRowChunk, best.row + best.row_count - row);
      multiply(row, count, column, columns, logits);
      for (int64_t m = row; m < row + count; ++m)
        scan_row(m, block, columns, logits + (m - row) * kVocabularyBlock, best);
    }
  }

  void multiply(int64_t row, int64_t count, int64_t column, int64_t columns, float* logits) const {
    gemm::Product product = {};
    product.weight = &weight;
    product.bias = bias;
    product.rows = rows.from(row);
    product.row_count = count;
    product.column = column;
    product.columns = columns;
    product.out = logits;
    product.out_stride = kVocabularyBlock;
    product_kernels.multiply(product);
    for (int64_t m = 0; m < count; ++m)
      for (int64_t j = columns; j < gemm::round_up(columns, gemm::kPanel); ++j)
        logits[m * kVocabularyBlock + j] = -kInfinity;
  }

  void scan_row(int64_t m, int64_t block, int64_t columns, float* logits, Partial& best) {
    const float largest = scan_kernels.maximum(logits, columns);
    const float shift = largest == -kInfinity ? 0.0f : largest;
    maxima[block * row_count + m] = shift;
    sums[block * row_count + m] = scan_kernels.sum_exp(logits, columns, shift);

    const int32_t first = static_cast<int32_t>(block * kVocabularyBlock);
    take_exceptions(m, first, columns, logits, best);
    int64_t i = 0;
    for (; i < columns && (best.size(m) < k || i % kScanStep != 0); ++i)
      if (logits[i] != -kInfinity || !exceptions.contains(m, first + i))
        best.offer(m, {logits[i], first + static_cast<int32_t>(i)});
    if (best.size(m) < k || largest <= best.begin(m)->logit) return;
    int32_t found[kScanStep];
    for (; i < columns; i += kScanStep) {
      const float threshold = best.begin(m)->logit;
      const int64_t count = scan_kernels.above(logits + i, std::min(kScanStep, columns - i), threshold, found);
      for (int64_t j = 0; j < count; ++j)
        best.offer(m, {logits[i + found[j]], first + static_cast<int32_t>(i + found[j])});
    }
  }

  // Keeps the logits of the row's exceptions in this block and hides them from the search.
  void take_exceptions(int64_t m, int32_t first, int64_t columns, float* logits, Partial& best) {
    int64_t& next = best.next_exception[m - best.row];
    while (next < exceptions.starts[m + 1] && exceptions.ids[next] < first) ++next;
    for (; next < exceptions.starts[m + 1] && exceptions.ids[next] < first + columns; ++next) {
      float& logit = logits[exceptions.ids[next] - first];
      exceptions.logits[next] = logit;
      logit = -kInfinity;
    }
  }

  double log_sum_exp(int64_t m) const {
    float largest = maxima[m];
    for (int64_t b = 1; b < blocks(); ++b) largest = std::max(largest, maxima[b * row_count + m]);
    double sum = 0.0;
    for (int64_t b = 0; b < blocks(); ++b)
      sum += sums[b * row_count + m] * std::exp(static_cast<double>(maxima[b * row_count + m]) - largest);
    return largest + std::log(sum);
  }
};

struct Scored {
  float score;
  Candidate candidate;
  bool operator<(const Scored& other) const {
    return score > other.score || (score == other.score && candidate < other.candidate);
  }
};

// The k best of a row among the partial searches and the exceptions.
void finish_row(const Head& head, std::vector<std::unique_ptr<Partial>>& partials, int64_t m, int32_t suppressed,
                float* values, int32_t* ids) {
  const double lse = head.log_sum_exp(m);
  if (!std::isfinite(lse)) {
    for (int64_t j = 0; j < head.k; ++j) {
      values[j] = std::numeric_limits<float>::quiet_NaN();
      ids[j] = static_cast<int32_t>(j);
    }
    return;
  }
  std::vector<Scored> scored;
  for (const auto& partial : partials) {
    if (m < partial->row || m >= partial->row + partial->row_count) continue;
    for (int64_t j = 0; j < partial->size(m); ++j) {
      const Candidate candidate = partial->begin(m)[j];
      scored.push_back({static_cast<float>(candidate.logit - lse), candidate});
    }
  }
  for (int64_t i = head.exceptions.starts[m]; i < head.exceptions.starts[m + 1]; ++i) {
    const Candidate candidate = {head.exceptions.logits[i], head.exceptions.ids[i]};
    const float score = static_cast<float>(candidate.logit - lse) + kForbidden;
    scored.push_back({candidate.id == suppressed ? kForbidden : score, candidate});
  }
  std::partial_sort(scored.begin(), scored.begin() + head.k, scored.end());
  for (int64_t j = 0; j < head.k; ++j) {
    values[j] = scored[j].score;
    ids[j] = scored[j].candidate.id;
  }
}

// Each thread takes block after block and keeps what it found; where the blocks are few, chunk after chunk of the rows.
std::vector<std::unique_ptr<Partial>> search(Head& head) {
  std::vector<std::unique_ptr<Partial>> partials;
  std::mutex mutex;
  const auto keep = [&](std::unique_ptr<Partial> partial) {
    const std::lock_guard<std::mutex> lock(mutex);
    partials.push_back(std::move(partial));
  };
  const int64_t threads = at::get_num_threads();
  if (head.blocks() >= 2 * threads || head.row_count <= kRowChunk) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads, head.blocks()), 1, [&](int64_t, int64_t) {
      auto partial = std::make_unique<Partial>(head.exceptions, 0, head.row_count, head.k);
      for (int64_t block = next.fetch_add(1); block < head.blocks(); block = next.fetch_add(1))
        head.scan(block, *partial);
      keep(std::move(partial));
    });
  } else {
    run_tasks((head.row_count + kRowChunk - 1) / kRowChunk, [&](int64_t i) {
      const int64_t row = i * kRowChunk;
      auto partial = std::make_unique<Partial>(head.exceptions, row, std::min(kRowChunk, head.row_count - row), head.k);
      for (int64_t block = 0; block < head.blocks(); ++block) head.scan(block, *partial);
      keep(std::move(partial));
    });
  }
  return partials;
}

at::Tensor check_banned(const at::Tensor& banned, int64_t rows) {
  check_dtype("lm_head_topk", "banned", banned, {at::kInt});
  check_shape("lm_head_topk", "banned", banned, {rows, -1});
  return banned.contiguous();
}

at::Tensor check_suppress(const at::Tensor& suppress, int64_t rows, int64_t suppress_id, int64_t vocab_size) {
  check_dtype("lm_head_topk", "suppress", suppress, {at::kBool});
  check_shape("lm_head_topk", "suppress", suppress, {rows});
  TORCH_CHECK(suppress_id >= 0 && suppress_id < vocab_size, "lm_head_topk: suppress_id must be from 0 to ",
              vocab_size - 1, ", got ", suppress_id);
  return suppress.contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lm_head_topk(const at::Tensor& x_any, const at::Tensor& blob, const at::Tensor& bias,
                                                int64_t vocab_size, int64_t format, int64_t k,
                                                const std::optional<at::Tensor>& banned, int64_t suppress_id,
                                                const std::optional<at::Tensor>& suppress) {
  const at::Tensor x = check_rows("lm_head_topk", x_any);
  const gemm::Weight weight = open_packed_weight("lm_head_topk", blob, format, vocab_size, x.size(1));
  const float* bias_values = check_floats("lm_head_topk", "bias", bias, {vocab_size});
  TORCH_CHECK(k >= 1 && k <= vocab_size, "lm_head_topk: k must be from 1 to the vocabulary's ", vocab_size, ", got ",
              k);
  const int64_t rows = x.size(0);
  at::Tensor banned_ids, suppressed;
  if (banned.has_value()) banned_ids = check_banned(*banned, rows);
  if (suppress.has_value()) suppressed = check_suppress(*suppress, rows, suppress_id, vocab_size);
  at::Tensor values = at::empty({rows, k}, x.options().dtype(at::kFloat));
  at::Tensor ids = at::empty({rows, k}, x.options().dtype(at::kInt));
  if (rows == 0) return {values, ids};

  const bool* suppress_rows = suppressed.defined() ? suppressed.const_data_ptr<bool>() : nullptr;
  const gemm::Kernels& product_kernels = gemm::kernels(current_isa(), weight.format);
  PackedRows packed_rows(product_kernels, weight, x, 0, rows);
  const at::Tensor storage = at::empty({packed_rows.storage_bytes()}, at::kByte);
  packed_rows.set_storage(static_cast<char*>(storage.data_ptr()));
  run_tasks((rows + kPackRows - 1) / kPackRows,
            [&](int64_t i) { packed_rows.pack(i * kPackRows, std::min(rows, (i + 1) * kPackRows)); });
  Head head = {product_kernels,
               lm_head::kernels(current_isa()),
               weight,
               bias_values,
               packed_rows,
               rows,
               k,
               list_exceptions(rows, vocab_size, banned_ids, static_cast<int32_t>(suppress_id), suppress_rows),
               {},
               {}};
  head.maxima.resize(head.blocks() * rows);
  head.sums.resize(head.blocks() * rows);
  std::vector<std::unique_ptr<Partial>> partials = search(head);
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      finish_row(head, partials, m, suppress_rows && suppress_rows[m] ? static_cast<int32_t>(suppress_id) : -1,
                 values.data_ptr<float>() + m * k, ids.data_ptr<int32_t>() + m * k);
  });
  return {values, ids};
}

}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("lm_head_topk", &minilm_fast::lm_head_topk); }
