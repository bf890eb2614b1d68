#include "relation_kl_tile.cuh"

// The forward pass. What is taken off the exponents has no effect on the results but for overflow, which in fp32 is far
// away, and for the rounding of exponents far from 0. Of a symmetric relation a row takes the largest of
// its scores with the rows of its warp, among which it is itself, else of its first 16; maxima are sought further on
// only where it does not see everything. Should a sum overflow all the same, the block does its rows again, with
// maxima.
namespace minilm_fast::cuda {
namespace {

// Sums beyond it were near to an overflow.
constexpr float kLargestTotal = 1e36f;

// The running sums of a warp's rows, x and y being the exponents of teacher and student: of exp2(x), of exp2(y), and
// of exp2(x) (x - y). A lane holds parts of them, see attention_rows.cuh.
template <typename T, typename Shape>
class RelationSums {
  static constexpr int kBlocks = Shape::kBlocks;
  using Scores = GroupScores<kBlocks>;

 public:
  __device__ RelationSums(const RelationKl& p, const unsigned char* own_teacher, const unsigned char* own_student)
      : teacher_scale_(p.teacher.scale), student_scale_(p.student.scale) {
    teacher_.load(own_teacher);
    student_.load(own_student);
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        teacher_taken_[b][half] = student_taken_[b][half] = -INFINITY;
        teacher_sum_[b][half] = student_sum_[b][half] = excess_[b][half] = 0.0f;
      }
  }

  // Adds the columns of a tile from `column` on, all of which all rows see; each row has seen one before.
  __device__ void add_seen(const unsigned char* teacher_tile, const unsigned char* student_tile, int column) {
    const int teacher_offset = lane_matrix_offset<Shape::kTeacherBytes>(true);
    const int student_offset = lane_matrix_offset<Shape::kStudentBytes>(true);
#pragma unroll 1
    for (; column < kAttentionColumns; column += kGroup) {
      Scores t, s;
      teacher_.multiply_group(t, teacher_tile, teacher_offset, column);
      student_.multiply_group(s, student_tile, student_offset, column);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2;
          const float x = fmaf(t[b][i / 4][i % 4], teacher_scale_, -teacher_taken_[b][half]);
          const float y = fmaf(s[b][i / 4][i % 4], student_scale_, -student_taken_[b][half]);
          add(b, half, x, y, x - y);
        }
    }
  }

  // Raises what is taken off the exponents to the largest scores of the first `columns` of a tile, and with kAdd adds
  // these columns, of which a row may see some. Row and column 0 are `first_row` and `first_column` of the sequence.
  template <bool kAdd>
  __device__ void take_masked(const Sequence& sequence, const unsigned char* teacher_tile,
                              const unsigned char* student_tile, int first_row, int first_column, int columns) {
    const int teacher_offset = lane_matrix_offset<Shape::kTeacherBytes>(true);
    const int student_offset = lane_matrix_offset<Shape::kStudentBytes>(true);
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
    for (int column = 0; column < columns; column += kGroup) {
      Scores t, s;
      teacher_.multiply_group(t, teacher_tile, teacher_offset, column);
      student_.multiply_group(s, student_tile, student_offset, column);
      // Else what the rows see is computed once and kept, for which the registers are too few.
      asm volatile("" : "+r"(first_row));
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Rows beyond the end are taken for the last, so that their sums are numbers.
          const Sight sees(sequence, min(first_row + b * 16 + half * 8 + lane / 4, sequence.length - 1));
          float teacher_most = -INFINITY, student_most = -INFINITY;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float &x = t[b][i / 2][2 * half + i % 2], &y = s[b][i / 2][2 * half + i % 2];
            const bool seen = sees(first_column + column + i / 2 * 8 + lane % 4 * 2 + i % 2);
            x = seen ? x * teacher_scale_ : -INFINITY;
            y = seen ? y * student_scale_ : -INFINITY;
            teacher_most = largest_or_nan(teacher_most, x);
            student_most = largest_or_nan(student_most, y);
          }
          raise(b, half, teacher_most, student_most);
          if (!kAdd) continue;
          // Nothing is taken off before the row has seen a column.
          const bool none = teacher_taken_[b][half] == -INFINITY;
          const float teacher_taken = none ? 0.0f : teacher_taken_[b][half];
          const float student_taken = none ? 0.0f : student_taken_[b][half];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float x = t[b][i / 2][2 * half + i % 2] - teacher_taken;
            const float y = s[b][i / 2][2 * half + i % 2] - student_taken;
            add(b, half, x, y, x == -INFINITY ? 0.0f : x - y);
          }
        }
    }
  }

  // Adds up the parts of the four lanes of a row; gives whether a sum of the warp is near to an overflow, or no number.
  __device__ bool add_up() {
    bool found = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (float* sum : {&teacher_sum_[b][half], &student_sum_[b][half], &excess_[b][half]}) {
          *sum = sum_of_row(*sum);
          found |= !(fabsf(*sum) <= kLargestTotal);
        }
      }
    return __any_sync(kFullWarp, found);
  }

  // Writes the log-sum-exps of the rows; gives this lane's part of the sum of their divergences. `lse` of both sides
  // point at the sequence's first token.
  __device__ double finish(int first_row, int length, double* teacher_lse, double* student_lse) const {
    constexpr double kLogOf2InDouble = 0.693147180559945309417;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    double total = 0.0;
    if (lane % 4 != 0) return total;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + b * 16 + half * 8 + lane / 4;
        if (row >= length) continue;
        const float2 teacher = logarithm(teacher_sum_[b][half]), student = logarithm(student_sum_[b][half]);
        teacher_lse[row] = (double{teacher_taken_[b][half]} + teacher.x + teacher.y) * kLogOf2InDouble;
        student_lse[row] = (double{student_taken_[b][half]} + student.x + student.y) * kLogOf2InDouble;
        const float divergence =
            excess_[b][half] / teacher_sum_[b][half] + (student.x - teacher.x) + (student.y - teacher.y);
        total += double{divergence} * kLogOf2InDouble;
      }
    return total;
  }

 private:
  __device__ void add(int b, int half, float x, float y, float difference) {
    const float p = exp2_approximate(x);
    teacher_sum_[b][half] += p;
    student_sum_[b][half] += exp2_approximate(y);
    excess_[b][half] = fmaf(p, difference, excess_[b][half]);
  }

  // Raises what is taken off the exponents of a row to the largest that its lanes have now.
  __device__ void raise(int b, int half, float teacher_most, float student_most) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      teacher_most = largest_or_nan(teacher_most, __shfl_xor_sync(kFullWarp, teacher_most, bit));
      student_most = largest_or_nan(student_most, __shfl_xor_sync(kFullWarp, student_most, bit));
    }
    float& teacher_taken = teacher_taken_[b][half];
    float& student_taken = student_taken_[b][half];
    const float teacher_before = teacher_taken, student_before = student_taken;
    teacher_taken = largest_or_nan(teacher_before, teacher_most);
    student_taken = largest_or_nan(student_before, student_most);
    // Before the row has seen a column its sums are zeros.
    const bool first = teacher_before == -INFINITY;
    const float teacher_step = first ? 0.0f : teacher_before - teacher_taken;
    const float student_step = first ? 0.0f : student_before - student_taken;
    const float factor = exp2_approximate(teacher_step);
    excess_[b][half] = factor * fmaf(teacher_sum_[b][half], teacher_step - student_step, excess_[b][half]);
    teacher_sum_[b][half] *= factor;
    student_sum_[b][half] *= exp2_approximate(student_step);
  }

  // log2 as an integer and a number in [0, 1).
  __device__ static float2 logarithm(float x) {
    const unsigned bits = __float_as_uint(x);
    return {static_cast<float>(static_cast<int>(bits >> 23) - 127),
            log2f(__uint_as_float((bits & 0x7fffffu) | 0x3f800000u))};
  }

  OwnRows<T, Shape::kTeacher, kBlocks> teacher_;
  OwnRows<T, Shape::kStudent, kBlocks> student_;
  float teacher_scale_, student_scale_;
  float teacher_taken_[kBlocks][2], student_taken_[kBlocks][2];
  float teacher_sum_[kBlocks][2], student_sum_[kBlocks][2], excess_[kBlocks][2];
};

// Two stages of columns, the own rows, and what the warps tell one another at the end.
template <typename Shape>
constexpr int kForwardSharedBytes =
    2 * Shape::kStageBytes + Shape::kOwnBytes + kAttentionWarps * static_cast<int>(sizeof(double) + sizeof(int));

// Adds all columns that rows of the block see. `first_row` is the warp's.
template <typename T, typename Shape>
__device__ void meet_columns(const RelationKl& p, const Sequence& sequence, int head, int block_row, int first_row,
                             bool with_maxima, unsigned char* shared, RelationSums<T, Shape>& sums) {
  const auto next = [&](int column) {
    while (column < sequence.length &&
           !Rectangle{block_row, block_row + Shape::kRows, column, column + kAttentionColumns}.any_seen(sequence))
      column += kAttentionColumns;
    return column;
  };
  const auto stage = [&](int column, int place) {
    if (column < sequence.length)
      stage_sides<T, Shape, kAttentionColumns>(p, false, sequence, head, column, shared + place * Shape::kStageBytes);
    commit_copies();
  };
  int column = next(0);
  stage(column, 0);
#pragma unroll 1
  for (int place = 0; column < sequence.length; place = 1 - place) {
    const int following = next(column + kAttentionColumns);
    wait_copies<0>();
    // Also: all warps are done with what the next copies replace.
    __syncthreads();
    stage(following, 1 - place);
    const unsigned char* teacher_tile = shared + place * Shape::kStageBytes;
    const unsigned char* student_tile = teacher_tile + kAttentionColumns * Shape::kTeacherBytes;
    const Rectangle met = {first_row, first_row + Shape::kWarpRows, column, column + kAttentionColumns};
    if (met.any_seen(sequence)) {
      const bool maxima = with_maxima || !met.all_seen(sequence);
      const int masked = maxima ? kAttentionColumns : column == 0 && !p.symmetric ? kGroup : 0;
      if (masked > 0) sums.template take_masked<true>(sequence, teacher_tile, student_tile, first_row, column, masked);
      if (masked < kAttentionColumns) sums.add_seen(teacher_tile, student_tile, masked);
    }
    column = following;
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kAttentionThreads, Shape::kResident) relation_kl_forward_kernel(RelationKl p) {
  const Sequence sequence(p.cu_seqlens, p.segments, blockIdx.z);
  const int head = blockIdx.y, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int block_row = static_cast<int>(blockIdx.x) * Shape::kRows;
  double* part = p.parts + (static_cast<int64_t>(blockIdx.z) * gridDim.y + head) * gridDim.x + blockIdx.x;
  if (block_row >= sequence.length) {
    if (threadIdx.x == 0) *part = 0.0;
    return;
  }
  unsigned char* shared = shared_memory();
  unsigned char* own = shared + 2 * Shape::kStageBytes;
  auto* totals = reinterpret_cast<double*>(own + Shape::kOwnBytes);
  auto* again = reinterpret_cast<int*>(totals + kAttentionWarps);
  stage_sides<T, Shape, Shape::kRows>(p, true, sequence, head, block_row, own);
  commit_copies();
  const float weight = relation_weight(p, sequence.length);
  wait_copies<0>();
  __syncthreads();

  const int first_row = block_row + warp * Shape::kWarpRows;
  const unsigned char* own_teacher = own + warp * Shape::kWarpRows * Shape::kTeacherBytes;
  const unsigned char* own_student =
      own + Shape::kRows * Shape::kTeacherBytes + warp * Shape::kWarpRows * Shape::kStudentBytes;
  RelationSums<T, Shape> sums(p, own_teacher, own_student);
  if (p.symmetric)
    sums.template take_masked<false>(sequence, own_teacher, own_student, first_row, first_row, Shape::kWarpRows);
#pragma unroll 1
  for (int with_maxima = 0; with_maxima < 2; ++with_maxima) {
    meet_columns<T, Shape>(p, sequence, head, block_row, first_row, with_maxima != 0, shared, sums);
    const bool overflows = sums.add_up();
    if (threadIdx.x % kLanes == 0) again[warp] = overflows;
    __syncthreads();
    if ((again[0] | again[1] | again[2] | again[3]) == 0 || with_maxima != 0) break;
    // All warps have read it, before they write it again.
    __syncthreads();
    sums.clear();
  }

  const int64_t place = head * p.tokens + sequence.first;
  double total = sums.finish(first_row, sequence.length, p.teacher.lse + place, p.student.lse + place);
#pragma unroll
  for (int bit = 4; bit < kLanes; bit *= 2) total += __shfl_xor_sync(kFullWarp, total, bit);
  if (threadIdx.x % kLanes == 0) totals[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) *part = (totals[0] + totals[1] + totals[2] + totals[3]) * weight;
}

template <typename T, typename Shape>
struct ForwardLaunch {
  static cudaError_t run(const RelationKl& p, cudaStream_t stream) {
    return launch(relation_kl_forward_kernel<T, Shape>, relation_grid<Shape>(p), dim3(kAttentionThreads),
                  kForwardSharedBytes<Shape>, stream, p);
  }
};

template <typename T, typename Shape>
struct CountBlocks {
  static int64_t run(const RelationKl& p) { return relation_grid<Shape>(p).x; }
};

}  // namespace

int64_t relation_kl_blocks(const RelationKl& p) { return with_relation_shape<CountBlocks, __half>(p); }

cudaError_t launch_relation_kl(const RelationKl& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  return launch_relation<ForwardLaunch>(p, stream);
}

}  // namespace minilm_fast::cuda
