#include "relation_kl_tile.cuh"

// The backward pass. With p the teacher's and q the student's probabilities, g = q - p, the gradient of row i of a is
// sum over j of g_ij b_j, and that of row j of b is sum over i of g_ij a_i: a block has its own rows of one and meets
// those of the other. Of a relation that is symmetric on both sides, and whose rows all see everything, scores of ij
// and ji are one number, and both probabilities come from one exponential; where the mask or the size of the scores
// forbids that, a block meets everything twice.
namespace minilm_fast::cuda {
namespace {

constexpr double kLog2OfEInDouble = 1.44269504088896340736;

// Whose distribution it is that probabilities are of: the own rows', the met rows', or both.
enum class Distribution { kOwn, kMet, kBoth };

// Differences of probabilities would leave the normal numbers of fp16; so many times them do not.
constexpr float kUnit = 4096.0f;
// How far a log-sum-exp (in powers of two) may lie from the block's common one, for one exponential to serve both
// distributions. What is flushed to zero belongs to probabilities below 2^-80.
constexpr float kFurthest = 45.0f;

// What makes a probability of a score: factor * 2^(score - reference), times the unit. The reference is an integer.
struct Normalizer {
  float reference, factor;
};

__device__ inline float common_reference(double lse) { return static_cast<float>(rint(lse * kLog2OfEInDouble)); }

// The reference is the common one unless the log-sum-exp is far from it or below zero: then zeros beyond the end, for
// rows that are not there, would give large numbers.
__device__ inline Normalizer normalizer(double lse, float common, bool& near) {
  const double exponent = lse * kLog2OfEInDouble;
  const float whole = static_cast<float>(rint(exponent));
  near = fabsf(whole - common) <= kFurthest && whole >= 0.0f;
  const float reference = near ? common : whole;
  return {reference, kUnit * exp2f(reference - whole) * exp2f(static_cast<float>(whole - exponent))};
}

// The normalizers of the rows that are met, of two rows at a place, and whether those that a warp has left all have the
// common reference.
struct Statistics {
  static constexpr int kPairs = kAttentionColumns / 2;
  float2 teacher_reference[kPairs], student_reference[kPairs];
  float2 teacher_factor[kPairs], student_factor[kPairs];
  int near[kAttentionWarps];
};

// The own rows of a warp, and their gradient.
template <typename T, typename Shape>
class RelationGradients {
  static constexpr int kBlocks = Shape::kBlocks;
  static constexpr int kDims = Shape::kStudent / 8;
  using Scores = GroupScores<kBlocks>;

 public:
  __device__ void load(const unsigned char* own_teacher, const unsigned char* own_student) {
    teacher_.load(own_teacher);
    student_.load(own_student);
  }

  // Both log-sum-exps point at the sequence's first token. Gives whether all rows have the common references.
  __device__ bool normalize(const double* teacher_lse, const double* student_lse, int first_row, int length,
                            float common_teacher, float common_student) {
    bool near = true;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Rows beyond the end are taken for the last.
        const int row = min(first_row + b * 16 + half * 8 + static_cast<int>(threadIdx.x) % kLanes / 4, length - 1);
        bool teacher_near, student_near;
        teacher_own_[b][half] = normalizer(teacher_lse[row], common_teacher, teacher_near);
        student_own_[b][half] = normalizer(student_lse[row], common_student, student_near);
        near &= teacher_near && student_near;
      }
    return !__any_sync(kFullWarp, !near);
  }

  // Adds the products of a tile. With kMasked, row and column 0 are `first_own` and `first_met` of the sequence.
  template <Distribution kOf, bool kMasked>
  __device__ void add(const RelationKl& p, const Sequence& sequence, const unsigned char* tile,
                      const Statistics& statistics, int first_own, int first_met) {
    const int teacher_offset = lane_matrix_offset<Shape::kTeacherBytes>(true);
    const int student_offset = lane_matrix_offset<Shape::kStudentBytes>(true);
    const int transposed_offset = lane_matrix_offset<Shape::kStudentBytes>(false);
    const unsigned char* student_tile = tile + kAttentionColumns * Shape::kTeacherBytes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    // Found before the scores take their registers: 16 bits a group.
    uint64_t all_seen = 0;
    if (kMasked) {
#pragma unroll 1
      for (int column = 0; column < kAttentionColumns; column += kGroup)
        all_seen |= uint64_t{pairs_seen<kOf>(sequence, first_own, first_met + column)} << column;
    }
#pragma unroll 1
    for (int column = 0; column < kAttentionColumns; column += kGroup) {
      const unsigned seen = static_cast<unsigned>(all_seen >> column);
      Scores t, s;
      teacher_.multiply_group(t, tile, teacher_offset, column);
      student_.multiply_group(s, student_tile, student_offset, column);
      uint32_t g[kBlocks][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int place = column + n * 8 + lane % 4 * 2;
        const Met met(statistics, place / 2);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float pair[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              pair[i] = difference<kOf>(p, b, half, t[b][n][2 * half + i], s[b][n][2 * half + i], met, i);
              if (kMasked && (seen >> pair_bit(b, half, n, i) & 1u) == 0) pair[i] = 0.0f;
            }
            g[b][2 * n + half] = pack_pair<T>(pair[0], pair[1]);
          }
      }
      add_products<T, 0, kBlocks>(gradient_, g, student_tile, transposed_offset, column);
    }
  }

  // Leaves the gradients times a factor in `shared`, where this warp's rows of the student are.
  __device__ void finish(unsigned char* shared, float factor) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) put_sums<T>(gradient_[b], factor, factor, shared, b * 16);
  }

 private:
  __device__ static constexpr int pair_bit(int b, int half, int n, int i) { return ((b * 2 + half) * 2 + n) * 2 + i; }

  // Of this lane's pairs of an own row and one of the 16 met rows from `first_met` on, those of which one sees the
  // other, bit by bit.
  template <Distribution kOf>
  __device__ static unsigned pairs_seen(const Sequence& sequence, int first_own, int first_met) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const auto own_row = [&](int j) { return first_own + j * 8 + lane / 4; };                  // of 2 * kBlocks
    const auto met_row = [&](int j) { return first_met + j / 2 * 8 + lane % 4 * 2 + j % 2; };  // of 4
    unsigned seen = 0;
    if (kOf == Distribution::kOwn) {
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const Sight sees(sequence, own_row(j));
#pragma unroll
        for (int k = 0; k < 4; ++k) seen |= static_cast<unsigned>(sees(met_row(k))) << (4 * j + k);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Sight sees(sequence, met_row(k));
#pragma unroll
        for (int j = 0; j < 2 * kBlocks; ++j) seen |= static_cast<unsigned>(sees(own_row(j))) << (4 * j + k);
      }
    }
    return seen;
  }

  // What is known of two met rows.
  struct Met {
    float2 teacher_reference, student_reference, teacher_factor, student_factor;

    __device__ Met(const Statistics& all, int pair)
        : teacher_reference(all.teacher_reference[pair]),
          student_reference(all.student_reference[pair]),
          teacher_factor(all.teacher_factor[pair]),
          student_factor(all.student_factor[pair]) {}
  };

  // Of both distributions, which have one reference, the sum of the factors.
  template <Distribution kOf>
  __device__ static float factor(const Normalizer& own, float met) {
    if (kOf == Distribution::kOwn) return own.factor;
    return kOf == Distribution::kMet ? met : own.factor + met;
  }

  // q - p, times the unit; `i` is which of the two met rows.
  template <Distribution kOf>
  __device__ float difference(const RelationKl& p, int b, int half, float t, float s, const Met& met, int i) const {
    const auto pick = [i](const float2& pair) { return i == 0 ? pair.x : pair.y; };
    const Normalizer &teacher = teacher_own_[b][half], &student = student_own_[b][half];
    constexpr bool kOfMet = kOf == Distribution::kMet;
    const float x = fmaf(t, p.teacher.scale, -(kOfMet ? pick(met.teacher_reference) : teacher.reference));
    const float y = fmaf(s, p.student.scale, -(kOfMet ? pick(met.student_reference) : student.reference));
    return fmaf(exp2_approximate(y), factor<kOf>(student, pick(met.student_factor)),
                -(exp2_approximate(x) * factor<kOf>(teacher, pick(met.teacher_factor))));
  }

  OwnRows<T, Shape::kTeacher, kBlocks> teacher_;
  OwnRows<T, Shape::kStudent, kBlocks> student_;
  Normalizer teacher_own_[kBlocks][2], student_own_[kBlocks][2];
  float gradient_[kBlocks][kDims][4] = {};
};

// Two stages of met rows, what normalizes them, the own rows.
template <typename Shape>
struct BackwardShared {
  Statistics statistics[2];
  unsigned char stages[2][Shape::kStageBytes];
  unsigned char own_teacher[Shape::kRows * Shape::kTeacherBytes];
  unsigned char own_student[Shape::kRows * Shape::kStudentBytes];
  float common_teacher, common_student;
  int near[kAttentionWarps];  // whether the own rows of a warp all have the common references
};

// The thread's number, asked for anew: what follows from it takes no register in between.
__device__ inline unsigned this_thread() {
  unsigned thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// Leaves the normalizers of the rows that are met; each thread has one row of one side at a time.
class MetStatistics {
  static_assert(2 * kAttentionColumns == kAttentionThreads, "a thread a row and side");

 public:
  // Starts to load those of 64 rows of a sequence; `place` is that of the sequence's first token.
  __device__ void load(const RelationKl& p, int64_t place, int first, int length) {
    const Mine mine;
    const double* lse = mine.of_teacher ? p.teacher.lse : p.student.lse;
    if (first + mine.row < length) value_ = lse[place + first + mine.row];
  }

  // Leaves them. A row that is not there counts nothing.
  __device__ void store(int first, int length, float common_teacher, float common_student, Statistics& all) const {
    const Mine mine;
    bool near = true;
    Normalizer own = {0.0f, 0.0f};
    if (first + mine.row < length) own = normalizer(value_, mine.of_teacher ? common_teacher : common_student, near);
    reinterpret_cast<float*>(mine.of_teacher ? all.teacher_reference : all.student_reference)[mine.row] = own.reference;
    reinterpret_cast<float*>(mine.of_teacher ? all.teacher_factor : all.student_factor)[mine.row] = own.factor;
    near = !__any_sync(kFullWarp, !near);
    if (mine.row % kLanes == 0) all.near[mine.warp] = near;
  }

 private:
  // What a thread has.
  struct Mine {
    int row, warp;
    bool of_teacher;

    __device__ Mine() {
      const unsigned thread = this_thread();
      row = thread % kAttentionColumns;
      warp = thread / kLanes;
      of_teacher = thread < kAttentionColumns;
    }
  };

  double value_ = 0.0;
};

// Some own rows of a block and 64 rows that it meets, of which those see these, or these those.
__device__ inline Rectangle rectangle(Distribution of, int own, int own_stop, int met) {
  const int met_stop = met + kAttentionColumns;
  return of == Distribution::kMet ? Rectangle{met, met_stop, own, own_stop} : Rectangle{own, own_stop, met, met_stop};
}

// A block, whose few numbers are computed anew where they are needed: registers are too few to keep them.
template <typename T, typename Shape>
struct BackwardBlock {
  const RelationKl& p;
  BackwardShared<Shape>& shared;

  __device__ Sequence sequence() const { return Sequence(p.cu_seqlens, p.segments, blockIdx.z); }
  __device__ int block_row() const { return static_cast<int>(blockIdx.x) * Shape::kRows; }
  __device__ static int warp() { return static_cast<int>(this_thread() / kLanes); }
  __device__ int first_row() const { return block_row() + warp() * Shape::kWarpRows; }
  // Of the log-sum-exps of the sequence's first token.
  __device__ int64_t place(const Sequence& sequence) const { return blockIdx.y * p.tokens + sequence.first; }

  // The own rows, to shared memory and from there to registers.
  __device__ void own(bool of_a, RelationGradients<T, Shape>& gradients) const {
    stage_sides<T, Shape, Shape::kRows>(p, of_a, sequence(), blockIdx.y, block_row(), shared.own_teacher);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    gradients.load(shared.own_teacher + warp() * Shape::kWarpRows * Shape::kTeacherBytes,
                   shared.own_student + warp() * Shape::kWarpRows * Shape::kStudentBytes);
  }

  // The first 64 rows from `met` on that are to be met, or some beyond the end.
  __device__ int next(Distribution of, const Sequence& sequence, int met) const {
    const int row = block_row();
    while (met < sequence.length && !rectangle(of, row, row + Shape::kRows, met).any_seen(sequence))
      met += kAttentionColumns;
    return met;
  }

  // Starts to load the met rows.
  __device__ void stage(Distribution of, const Sequence& sequence, int met, int stage, MetStatistics& loader) const {
    if (met < sequence.length) {
      const bool of_a = of == Distribution::kMet;
      stage_sides<T, Shape, kAttentionColumns>(p, of_a, sequence, blockIdx.y, met, shared.stages[stage]);
      loader.load(p, place(sequence), met, sequence.length);
    }
    commit_copies();
  }

  __device__ void store(int met, int stage, const MetStatistics& loader) const {
    loader.store(met, sequence().length, shared.common_teacher, shared.common_student, shared.statistics[stage]);
  }

  template <Distribution kOf>
  __device__ void add(int met, int stage, RelationGradients<T, Shape>& gradients) const {
    const Sequence all = sequence();
    const int row = first_row();
    const Rectangle seen = rectangle(kOf, row, min(row + Shape::kWarpRows, all.length), met);
    if (!seen.any_seen(all)) return;
    if (kOf == Distribution::kBoth || seen.all_seen(all))
      gradients.template add<kOf, false>(p, all, shared.stages[stage], shared.statistics[stage], row, met);
    else
      gradients.template add<kOf, true>(p, all, shared.stages[stage], shared.statistics[stage], row, met);
  }

  // Adds what the own rows get from all others.
  __device__ void meet(Distribution of, RelationGradients<T, Shape>& gradients) const {
    MetStatistics loader;
    int met = next(of, sequence(), 0);
    stage(of, sequence(), met, 0, loader);
    store(met, 0, loader);
#pragma unroll 1
    for (int i = 0; met < sequence().length; i = 1 - i) {
      wait_copies<0>();
      // Also: all warps are done with what the next copies replace.
      __syncthreads();
      const int following = next(of, sequence(), met + kAttentionColumns);
      stage(of, sequence(), following, 1 - i, loader);
      const int* near = shared.statistics[i].near;
      if (of == Distribution::kBoth && (near[0] & near[1] & near[2] & near[3] & shared.near[warp()]) != 0) {
        add<Distribution::kBoth>(met, i, gradients);
      } else {
        if (of != Distribution::kMet) add<Distribution::kOwn>(met, i, gradients);
        if (of != Distribution::kOwn) add<Distribution::kMet>(met, i, gradients);
      }
      store(following, 1 - i, loader);
      met = following;
    }
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(kAttentionThreads, Shape::kResident)
    relation_kl_backward_kernel(RelationKl p, RelationGradient of) {
  auto& shared = *reinterpret_cast<BackwardShared<Shape>*>(shared_memory());
  const BackwardBlock<T, Shape> block = {p, shared};
  const Sequence sequence = block.sequence();
  if (block.block_row() >= sequence.length) return;

  const int64_t place = block.place(sequence);
  const double *teacher_lse = p.teacher.lse + place, *student_lse = p.student.lse + place;
  const float common_teacher = common_reference(teacher_lse[block.block_row()]);
  const float common_student = common_reference(student_lse[block.block_row()]);
  RelationGradients<T, Shape> gradients;
  const bool near =
      gradients.normalize(teacher_lse, student_lse, block.first_row(), sequence.length, common_teacher, common_student);
  if (threadIdx.x % kLanes == 0) shared.near[block.warp()] = near;
  if (threadIdx.x == 0) {
    shared.common_teacher = common_teacher;
    shared.common_student = common_student;
  }

  const bool at_once = of == RelationGradient::kOfBoth && p.symmetric && sequence.source == sequence.length;
#pragma unroll 1
  for (int round = of == RelationGradient::kOfB; round < (of == RelationGradient::kOfA || at_once ? 1 : 2); ++round) {
    // All warps are done with what they have met.
    __syncthreads();
    block.own(round == 0, gradients);
    block.meet(at_once ? Distribution::kBoth : round == 0 ? Distribution::kOwn : Distribution::kMet, gradients);
  }

  const float weight = relation_weight(p, sequence.length);
  const int first_row = block.first_row();
  if (first_row >= sequence.length) return;
  unsigned char* results = shared.own_student + block.warp() * Shape::kWarpRows * Shape::kStudentBytes;
  gradients.finish(results, *p.grad * weight * p.student.scale * kLogOf2 / kUnit);
  __syncwarp();
  const int64_t stride = static_cast<int64_t>(p.heads) * p.student.size;
  auto* out = static_cast<T*>(p.student_grad) + sequence.first * stride + blockIdx.y * p.student.size;
  store_rows<T, Shape::kStudent, Shape::kWarpRows>(results, out, stride, first_row, sequence.length, p.student.size);
}

template <typename T, typename Shape>
struct BackwardLaunch {
  static cudaError_t run(const RelationKl& p, RelationGradient of, cudaStream_t stream) {
    return launch(relation_kl_backward_kernel<T, Shape>, relation_grid<Shape>(p), dim3(kAttentionThreads),
                  sizeof(BackwardShared<Shape>), stream, p, of);
  }
};

}  // namespace

cudaError_t launch_relation_kl_backward(const RelationKl& p, RelationGradient of, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  return launch_relation<BackwardLaunch>(p, of, stream);
}

}  // namespace minilm_fast::cuda
