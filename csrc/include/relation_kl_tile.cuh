#pragma once

#include <cmath>

#include "attention_mask.cuh"
#include "attention_tiles.cuh"
#include "relation_kl_cuda.h"

// What the forward and the backward pass of the distillation loss share. A block takes one head and 64 or 128 rows of a
// sequence, its own; each warp has 16 or 32 of them, as left operands in registers. It meets the sequence's tokens 64
// at a time, of teacher and student together, and multiplies 16 of them at once: scores lie as multiply_add leaves
// them.
namespace minilm_fast::cuda {

constexpr int kGroup = 16;  // columns that are multiplied at once

template <int kTeacherSize, int kStudentSize>
struct RelationShape {
  static constexpr int kTeacher = kTeacherSize, kStudent = kStudentSize;
  static constexpr int kBlocks = kTeacher == 128 ? 1 : 2;  // of 16 rows, of a warp
  static constexpr int kWarpRows = kBlocks * 16;
  static constexpr int kRows = kAttentionWarps * kWarpRows;
  static constexpr int kTeacherBytes = kTeacher * 2, kStudentBytes = kStudent * 2;  // of a row
  static constexpr int kStageBytes = kAttentionColumns * (kTeacherBytes + kStudentBytes);
  static constexpr int kOwnBytes = kRows * (kTeacherBytes + kStudentBytes);
  // Blocks of threads that are to fit on a multiprocessor.
  static constexpr int kResident = kTeacher >= 64 && kStudent >= 64 ? 2 : kTeacher == 16 ? 4 : 3;
};

// Starts to copy rows from `first` on of the teacher's a or b and, behind them, of the student's.
template <typename T, typename Shape, int kCount>
__device__ void stage_sides(const RelationKl& p, bool of_a, const Sequence& sequence, int head, int first,
                            unsigned char* shared) {
  const auto rows = [&](const RelationOperands& x) {
    return of_a ? head_rows<T>(x.a, x.a_token, x.a_head, head) : head_rows<T>(x.b, x.b_token, x.b_head, head);
  };
  const int token = sequence.first + first, count = sequence.length - first;
  stage_rows<T, Shape::kTeacher, kCount>(rows(p.teacher), token, count, shared, p.teacher.size);
  stage_rows<T, Shape::kStudent, kCount>(rows(p.student), token, count, shared + kCount * Shape::kTeacherBytes,
                                         p.student.size);
}

template <int kBlocks>
using GroupScores = float[kBlocks][2][4];

// The rows of a warp of one side.
template <typename T, int kSize, int kBlocks>
struct OwnRows {
  uint32_t rows[kBlocks][kSize / 16][4];

  __device__ void load(const unsigned char* shared) {
    const int offset = lane_matrix_offset<kSize * 2>(false);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int d = 0; d < kSize / 16; ++d) load_matrices(rows[b][d], tile_matrix<kSize * 2>(shared, offset, b * 16, d));
  }

  // Scores of the 16 columns of a tile from `column` on; `offset` is lane_matrix_offset, swapped.
  __device__ void multiply_group(GroupScores<kBlocks>& scores, const unsigned char* tile, int offset,
                                 int column) const {
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d) {
      uint32_t k[4];
      load_matrices(k, tile_matrix<kSize * 2>(tile, offset, column, d));
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (d == 0)
            multiply<T>(scores[b][n], rows[b][d], k[2 * n], k[2 * n + 1]);
          else
            multiply_add<T>(scores[b][n], rows[b][d], k[2 * n], k[2 * n + 1]);
        }
    }
  }
};

// The columns that a row sees: those before `prefix`, and `self`. A row beyond the end sees none.
struct Sight {
  int prefix, self;

  __device__ Sight(const Sequence& sequence, int row) : prefix(sequence.prefix(row)), self(row) {
    if (row < sequence.end) self = -1;
    if (row >= sequence.length) prefix = self = -1;
  }

  __device__ bool operator()(int column) const { return column < prefix || column == self; }
};

// Some rows of a sequence and some of its columns.
struct Rectangle {
  int row, row_stop, column, column_stop;

  // Whether one of the rows sees one of the columns. What is beyond the end is cut off.
  __device__ bool any_seen(const Sequence& sequence) const {
    const int rows = min(row_stop, sequence.length), columns = min(column_stop, sequence.length);
    if (row >= rows || column >= columns) return false;
    if (sequence.source >= sequence.length) return true;
    return column < sequence.longest(row, rows) || max(max(row, column), sequence.end) < min(rows, columns);
  }

  // Whether each of the rows that are there sees all of the columns, which all are there.
  __device__ bool all_seen(const Sequence& sequence) const {
    if (sequence.source >= sequence.length) return column_stop <= sequence.length;
    return column_stop <= sequence.shortest(row, min(row_stop, sequence.length));
  }
};

// A row's weight in the loss.
__device__ inline float relation_weight(const RelationKl& p, int length) {
  if (p.reduction == RelationReduction::kSum) return 1.0f;
  if (p.reduction == RelationReduction::kTokenMean) return 1.0f / (static_cast<float>(p.heads) * p.tokens);
  int filled = 0;
  for (int i = 0; i < p.batch; i += kLanes) {
    const int index = i + static_cast<int>(threadIdx.x) % kLanes;
    filled += __popc(__ballot_sync(kFullWarp, index < p.batch && p.cu_seqlens[index] < p.cu_seqlens[index + 1]));
  }
  return 1.0f / (static_cast<float>(p.heads) * length * filled);
}

// Calls launch(size<T, kTeacher, kStudent>) of the least sizes that hold both sides.
template <template <typename, typename> class Launch, typename T, typename... Arguments>
auto with_relation_shape(const RelationKl& p, Arguments... arguments) {
  const int teacher = p.teacher.size, student = p.student.size;
  if (max(teacher, student) <= 16) return Launch<T, RelationShape<16, 16>>::run(p, arguments...);
  if (max(teacher, student) <= 32) return Launch<T, RelationShape<32, 32>>::run(p, arguments...);
  if (teacher <= 64 && student <= 32) return Launch<T, RelationShape<64, 32>>::run(p, arguments...);
  if (max(teacher, student) <= 64) return Launch<T, RelationShape<64, 64>>::run(p, arguments...);
  return Launch<T, RelationShape<128, 128>>::run(p, arguments...);
}

// The same for the type too.
template <template <typename, typename> class Launch, typename... Arguments>
cudaError_t launch_relation(const RelationKl& p, Arguments... arguments) {
  for (const int size : {p.teacher.size, p.student.size})
    if (size < 8 || size > kMostRelationSize || size % 8 != 0) return cudaErrorInvalidValue;
  if (p.dtype == Dtype::kHalf) return with_relation_shape<Launch, __half>(p, arguments...);
  if (p.dtype == Dtype::kBFloat16) return with_relation_shape<Launch, __nv_bfloat16>(p, arguments...);
  return cudaErrorInvalidValue;
}

template <typename Shape>
dim3 relation_grid(const RelationKl& p) {
  return dim3((p.max_seqlen + Shape::kRows - 1) / Shape::kRows, p.heads, p.batch);
}

}  // namespace minilm_fast::cuda
