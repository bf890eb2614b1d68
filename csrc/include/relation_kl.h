#pragma once

#include <cstdint>

namespace minilm_fast {

// The distillation loss of a relation, see minilm_fast/ops/relation_kl.py. Strides are in elements; the last dimension
// is contiguous.
struct RelationOperand {
  const void* data;
  int64_t token, head;
};

struct RelationSide {
  RelationOperand a, b;
  bool bf16;  // storage of a and b; otherwise fp32
  int64_t size;
  double scale;
  double* lse;  // [heads, tokens]: written by the forward, read by the backward pass
};

struct RelationProblem {
  RelationSide teacher, student;
  int64_t tokens, heads;
  float* divergence;      // [heads, tokens], written by the forward pass
  bool grad_bf16;         // storage of the gradients; otherwise fp32
  void *grad_a, *grad_b;  // [tokens, heads, student size], contiguous; without grad_b their sum goes to grad_a
};

// Some rows of one head of one sequence. Where `triangle` is set they are all its rows, both relations are symmetric
// and every row sees every column: half of the scores are enough.
struct RelationTask {
  int64_t first;  // token
  int64_t source, target, pseudo;
  int64_t head;
  int64_t row_begin, row_end;  // within the sequence
  bool triangle;
  float weight;      // of the rows' divergence in the loss, times the gradient that comes in
  int64_t b_offset;  // elements from grad_b to the copy that this task writes
};

// `scratch` holds relation_scratch floats, aligned to 64 bytes. The forward pass writes the divergence and both lse of
// the task's rows; the backward pass grad_a of its rows and grad_b of all rows of its sequence.
using RelationKernel = void (*)(const RelationProblem&, const RelationTask&, float* scratch);

struct RelationKernels {
  RelationKernel forward, backward;
};

extern const RelationKernels relation_kl_default, relation_kl_avx2, relation_kl_avx512;
extern const RelationKernels relation_kl_amx;  // only if both sides are bf16

// Scratch memory, in floats, for tasks of sequences up to `length` tokens with any instruction set.
static inline int64_t relation_scratch(const RelationProblem& problem, int64_t length) {
  constexpr int64_t kTile = 32, kMostRows = 32, kPlaces = 64;
  const int64_t columns = length + 2 * kPlaces;
  const int64_t teacher = (problem.teacher.size + kTile) / kTile * kTile + kTile;
  const int64_t student = (problem.student.size + kTile) / kTile * kTile + kTile;
  return (teacher + 4 * student + 8) * columns + kMostRows * (teacher + student) + kPlaces * 16;
}

}  // namespace minilm_fast
