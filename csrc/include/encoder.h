#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "packed_weight.h"
#include "stages.h"

// The layers of an encoder over some packed sequences, on one thread or several.
namespace minilm_fast {

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

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Takes one piece after the other of a block of memory; without memory it only counts.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t bytes) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += gemm::round_up(bytes, 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Some whole sequences, their queries, keys and values and their context, which threads may share; and the steps of a
// layer. Rows count from the first token of the sequences.
class Span {
 public:
  Span(const Encoder& encoder, Range sequences, Carver& carver);

  int64_t tokens() const { return tokens_; }
  int64_t sequences() const { return sequences_.size(); }
  int64_t length(int64_t sequence) const;
  const float* input() const { return e_.x + first_ * e_.hidden; }
  float* output() const { return e_.out + first_ * e_.hidden; }
  char* projection() const { return projection_; }
  char* context() const { return context_; }

  int64_t packed_bytes(int64_t rows) const;
  int64_t attention_bytes() const { return 4 * attention_scratch(problem_, e_.longest); }

  // Rows times the columns of a weight; `out` is that of the first row and of column 0.
  void multiply(const LinearLayer& layer, const PackedRows& rows, int64_t count, Range columns, void* out,
                bool out_bf16, bool gelu) const;
  PackedRows pack(const LinearLayer& layer, const void* rows, bool bf16, int64_t count, char* memory) const;
  void attend(int64_t sequence, Range heads, float* scratch) const;
  // LayerNorm of sums and a residual, which may be the output's own memory.
  void normalize(const NormLayer& norm, const float* sums, const float* residual, Range rows, float* out) const;

 private:
  AttentionProblem make_problem() const;

  const Encoder& e_;
  Range sequences_;
  int64_t first_, tokens_;
  char *projection_, *context_;
  AttentionProblem problem_;
};

// Every slot has some of the rows; threads meet before and after the attention. `memory` may be null to learn `bytes`.
class RowTeam {
 public:
  RowTeam(const Encoder& encoder, Range sequences, int64_t slots, char* memory);
  int64_t bytes() const { return bytes_; }
  void run(Stages::Member& member) const;

 private:
  struct Slot {
    Range rows, pairs;  // pairs of a sequence and a head
    char *inner, *packed;
    float *sums, *attention;
  };

  void share_rows();
  void share_pairs();
  void project(const Layer& layer, const float* x, Range rows, const Slot& slot) const;
  void attend(const Slot& slot) const;
  void finish(const Layer& layer, const float* x, Range rows, const Slot& slot) const;
  template <class Step>
  static void for_each_block(Range rows, Step step);

  const Encoder& e_;
  Carver carver_;
  Span span_;
  std::vector<Slot> slots_;
  int64_t bytes_;
};

// For few rows: every slot has some of the heads and of the columns of every product, so that a weight is read once;
// the norms are computed, and rows are packed, by every slot for itself. Threads meet four times a layer.
class ColumnTeam {
 public:
  ColumnTeam(const Encoder& encoder, Range sequences, int64_t slots, char* memory);
  // The most slots that have work; 0 where the columns of a head cannot be told apart in a packed weight.
  static int64_t most_slots(const Encoder& encoder);
  int64_t bytes() const { return bytes_; }
  void run(Stages::Member& member) const;

 private:
  struct Slot {
    Range rows, heads, hidden, inner;
    float* stream;  // the residual stream, all rows
    char* packed;
    float* attention;
  };

  void attend(const Layer& layer, const float* x, const Slot& slot) const;

  const Encoder& e_;
  Carver carver_;
  Span span_;
  char* inner_;
  float* sums_;
  std::vector<Slot> slots_;
  int64_t bytes_;
};

}  // namespace minilm_fast
