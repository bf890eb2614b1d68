#pragma once

// The kernels behind relation_kl_<isa>, compiled once for each instruction set.

#include "relation_kl.h"
#include "relation_kl_tile.h"

namespace minilm_fast {
namespace {

// Calls f with the address of a row, of the type that it is stored in.
template <class F>
inline auto with_row(const RelationOperand& x, bool bf16, int64_t token, int64_t head, F f) {
  const int64_t offset = token * x.token + head * x.head;
  if (bf16) return f(static_cast<const Bf16*>(x.data) + offset);
  return f(static_cast<const float*>(x.data) + offset);
}

// The rows of a task: where they are, what they see, and where their results go.
class RelationRows {
 protected:
  RelationRows(const RelationProblem& problem, const RelationTask& task)
      : p_(problem), t_(task), length_(task.source + task.target + task.pseudo) {}

  bool is_pseudo(int64_t row) const { return row >= t_.source + t_.target; }

  // How many columns, counted from the first, a row sees; a pseudo row also sees itself.
  int64_t prefix(int64_t row) const {
    if (row < t_.source) return t_.source;
    if (!is_pseudo(row)) return row + 1;
    const int64_t before = row - t_.target, all = t_.source + t_.target;
    return before < all ? before : all;
  }

  // The largest prefix among rows [begin, end).
  int64_t visible_columns(int64_t begin, int64_t end) const {
    int64_t most = prefix(begin);
    for (int64_t row = begin + 1; row < end; ++row)
      if (prefix(row) > most) most = prefix(row);
    return most;
  }

  // `shift`: what was taken from the differences of exponents.
  void write_statistics(int64_t row, const RowState& state, double shift = 0.0) const {
    const int64_t i = t_.head * p_.tokens + t_.first + row;
    const double log_t = __builtin_log(state.total_t), log_s = __builtin_log(state.total_s);
    p_.teacher.lse[i] = state.max_t * kLn2 + log_t;
    p_.student.lse[i] = state.max_s * kLn2 + log_s;
    p_.divergence[i] = static_cast<float>((shift + state.dot / state.total_t) * kLn2 - log_t + log_s);
  }

  double lse(const RelationSide& side, int64_t row) const { return side.lse[t_.head * p_.tokens + t_.first + row]; }

  // The reciprocal of each row's sum of exponentials.
  void write_reciprocals(const RelationSide& side, float* to) const {
    for (int64_t j = 0; j < length_; ++j) to[j] = static_cast<float>(__builtin_exp(-lse(side, j)));
  }

  template <class F>
  static void for_groups(int rows, F f) {
    int r = 0;
    for (; r + kRowGroup <= rows; r += kRowGroup) f(Constant<kRowGroup>(), r);
    for (; r < rows; ++r) f(Constant<1>(), r);
  }

  static float own_gradient(float t, float s, RowNorm norm_t, RowNorm norm_s) {
    float scores_t[kLanes] = {t}, scores_s[kLanes] = {s};
    take_gradients(scores_t, scores_s, 1, 1, 1.0f, 1.0f, norm_t, norm_s);
    return scores_s[0];
  }

  template <class F>
  void with_gradient(void* gradients, int64_t row, int64_t offset, F f) const {
    const int64_t i = ((t_.first + row) * p_.heads + t_.head) * p_.student.size + offset;
    if (p_.grad_bf16) return f(static_cast<Bf16*>(gradients) + i);
    f(static_cast<float*>(gradients) + i);
  }

  // Writes the gradients: of a's rows from row_sums [rows, width], of b's rows from column_sums [size, stride], which
  // are in units of `column_unit`.
  void write_gradients(const float* row_sums, int64_t width, const float* column_sums, int64_t stride,
                       double column_unit) const {
    const float factor_a = static_cast<float>(p_.student.scale * t_.weight);
    const float factor_b = static_cast<float>(column_unit * t_.weight);
    const bool both = p_.grad_b == nullptr;
    for (int64_t j = 0; j < length_; j += kLanes) {
      for (int64_t d = 0; d < p_.student.size; d += kLanes) {
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          square[i] = d + i < p_.student.size ? load(column_sums + (d + i) * stride + j) * factor_b : Vec{};
        transpose(square);
        for (int64_t i = 0; i < kLanes && j + i < length_; ++i)
          write_pieces(j + i, d, row_sums + (j + i - t_.row_begin) * width + d, factor_a, square[i], both);
      }
    }
  }

  const RelationProblem& p_;
  const RelationTask& t_;
  int64_t length_;

 private:
  void write_pieces(int64_t row, int64_t d, const float* row_sums, float factor_a, Vec b, bool both) const {
    const int64_t left = p_.student.size - d;
    if (row >= t_.row_begin && row < t_.row_end) {
      const Vec a = load(row_sums) * factor_a;
      with_gradient(p_.grad_a, row, d, [&](auto* to) { store_first(to, both ? a + b : a, left); });
    }
    if (!both) with_gradient(p_.grad_b, row, t_.b_offset + d, [&](auto* to) { store_first(to, b, left); });
  }
};

// One side's data, unpacked to floats. The rows are scaled so that scores are powers of two.
struct UnpackedSide {
  const RelationSide& side;
  float scale;
  float* columns;  // b: [size, stride], zeros beyond the length
  float* rows;     // a tile of a: [size, kRowStride]
};

class RelationHead : RelationRows {
 public:
  RelationHead(const RelationProblem& problem, const RelationTask& task, float* scratch)
      : RelationRows(problem, task),
        // An odd number of cache lines: columns of one token would share the sets of the cache.
        stride_((round_up(length_ + 2 * kLanes, 16) / 16 | 1) * 16),
        width_(round_up(problem.student.size, kLanes)),
        memory_(scratch),
        teacher_(set_up(problem.teacher)),
        student_(set_up(problem.student)) {}

  void forward() {
    unpack_columns(teacher_);
    unpack_columns(student_);
    float* differences = zeros(stride_);
    if (is_triangle(differences)) return forward_triangle(differences);
    for_tiles([&](auto constant, int64_t row, int rows) { forward_tile<decltype(constant)::value>(row, rows); });
  }

  void backward() {
    unpack_columns(teacher_);
    unpack_columns(student_);
    values_ = take(length_ * width_);
    for (int64_t j = 0; j < length_; ++j) unpack_value(j);
    column_sums_ = zeros((p_.student.size + 1) * stride_);
    row_sums_ = zeros((t_.row_end - t_.row_begin + kTileRows) * width_);
    if (is_triangle(zeros(stride_)))
      backward_triangle();
    else
      for_tiles([&](auto constant, int64_t row, int rows) { backward_tile<decltype(constant)::value>(row, rows); });
    write_gradients(row_sums_, width_, column_sums_, stride_, kLn2);
  }

 private:
  static constexpr float kFactor = 1.0f;

  float* take(int64_t floats) {
    float* memory = memory_;
    memory_ += round_up(floats, 16);
    return memory;
  }

  float* zeros(int64_t floats) {
    float* memory = take(floats);
    std::memset(memory, 0, sizeof(float) * floats);
    return memory;
  }

  UnpackedSide set_up(const RelationSide& side) {
    float* columns = take(side.size * stride_);
    return {side, static_cast<float>(side.scale * kLog2E), columns, take((side.size + 1) * kRowStride)};
  }

  void unpack_columns(UnpackedSide& side) {
    const RelationSide& s = side.side;
    with_row(s.b, s.bf16, t_.first, t_.head, [&](auto* b) {
      write_transposed([&](int64_t j) { return b + j * s.b.token; }, length_, s.size, side.columns, stride_);
    });
    const int64_t end = round_up(length_, kLanes);
    for (int64_t d = 0; d < s.size; ++d)
      std::memset(side.columns + d * stride_ + end, 0, sizeof(float) * (stride_ - end));
  }

  void unpack_value(int64_t j) {
    const RelationSide& s = p_.student;
    with_row(s.b, s.bf16, t_.first + j, t_.head, [&](auto* b) {
      for (int64_t d = 0; d < width_; d += kLanes) store(values_ + j * width_ + d, load_first(b + d, s.size - d));
    });
  }

  void unpack_rows(UnpackedSide& side, int64_t row, int rows) {
    const RelationSide& s = side.side;
    with_row(s.a, s.bf16, t_.first + row, t_.head, [&](auto* a) {
      write_transposed([&](int64_t r) { return a + r * s.a.token; }, rows, s.size, side.rows, kRowStride);
    });
    for (int64_t i = 0; i < s.size * kRowStride; ++i) side.rows[i] *= side.scale;
  }

  template <class F>
  void for_tiles(F f) {
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kTileRows) {
      const int64_t left = t_.row_end - row;
      const int rows = static_cast<int>(left < kTileRows ? left : kTileRows);
      unpack_rows(teacher_, row, rows);
      unpack_rows(student_, row, rows);
      with_rows(rows, [&](auto constant) { f(constant, row, rows); });
    }
  }

  // Calls f(first, count) for blocks of the columns [begin, end) after both sides' scores with them are there.
  template <int Padded, class F>
  void for_blocks(int64_t begin, int64_t end, F f) {
    for (int64_t first = begin; first < end; first += kRelationBlock) {
      const int64_t count = end - first < kRelationBlock ? end - first : kRelationBlock;
      relate<Padded>(teacher_.rows, teacher_.columns + first, stride_, p_.teacher.size, count, scores_t_);
      relate<Padded>(student_.rows, student_.columns + first, stride_, p_.student.size, count, scores_s_);
      f(first, count);
    }
  }

  // The score of a pseudo row with its own column, as a power of two.
  float own_score(const UnpackedSide& side, int64_t row, int r) const {
    float score = 0.0f;
    for (int64_t d = 0; d < side.side.size; ++d)
      score += side.rows[d * kRowStride + r] * side.columns[d * stride_ + row];
    return score;
  }

  template <int Padded>
  void forward_tile(int64_t row, int rows) {
    RowState states[kTileRows];
    for (int r = 0; r < rows; ++r) {
      states[r] = unseen();
      if (is_pseudo(row + r)) states[r] = {own_score(teacher_, row + r, r), own_score(student_, row + r, r), 1, 1, 0};
    }
    for_blocks<Padded>(0, visible_columns(row, row + rows), [&](int64_t first, int64_t count) {
      for (int r = 0; r < rows; ++r) {
        const int64_t left = prefix(row + r) - first, seen = left < count ? left : count;
        if (seen <= 0) continue;
        see_columns(states[r], scores_t_ + r * kRelationStride, scores_s_ + r * kRelationStride, seen, kFactor,
                    kFactor);
      }
    });
    for (int r = 0; r < rows; ++r) write_statistics(row + r, states[r]);
  }

  template <int Padded>
  void backward_tile(int64_t row, int rows) {
    float* row_sums = row_sums_ + (row - t_.row_begin) * width_;
    RowNorm norm_t[kTileRows], norm_s[kTileRows];
    for (int r = 0; r < rows; ++r) {
      norm_t[r] = row_norm(lse(p_.teacher, row + r));
      norm_s[r] = row_norm(lse(p_.student, row + r));
      if (is_pseudo(row + r)) add_own_gradient(row + r, r, norm_t[r], norm_s[r], row_sums + r * width_);
    }
    for_blocks<Padded>(0, visible_columns(row, row + rows), [&](int64_t first, int64_t count) {
      for (int r = 0; r < rows; ++r) {
        const int64_t left = prefix(row + r) - first, seen = left < count ? left : count;
        take_gradients(scores_t_ + r * kRelationStride, scores_s_ + r * kRelationStride, seen > 0 ? seen : 0, count,
                       kFactor, kFactor, norm_t[r], norm_s[r]);
      }
      add_row_sums<Padded>(scores_s_, values_ + first * width_, count, width_, row_sums);
      add_column_sums(student_.rows, scores_s_, rows, p_.student.size, count, stride_, column_sums_ + first);
    });
  }

  void add_own_gradient(int64_t row, int r, RowNorm norm_t, RowNorm norm_s, float* row_sums) {
    const float gradient = own_gradient(own_score(teacher_, row, r), own_score(student_, row, r), norm_t, norm_s);
    for (int64_t d = 0; d < p_.student.size; ++d) {
      row_sums[d] += gradient * values_[row * width_ + d];
      column_sums_[d * stride_ + row] += gradient * student_.rows[d * kRowStride + r];
    }
  }

  // Whether the task is a triangle and no score can be so large that a maximum must be subtracted. If so, writes the
  // difference of both sides' scores of each row with itself.
  bool is_triangle(float* differences) {
    if (!t_.triangle) return false;
    float* squares = zeros(stride_);
    if (!(own_scores(teacher_, differences) <= kBounded && own_scores(student_, squares) <= kBounded)) return false;
    for (int64_t j = 0; j < length_; j += kLanes) store(differences + j, load(differences + j) - load(squares + j));
    return true;
  }

  // Of a symmetric relation; returns the largest, which bounds all scores.
  float own_scores(const UnpackedSide& side, float* to) const {
    Vec most = {};
    for (int64_t j = 0; j < length_; j += kLanes) {
      Vec squares = {};
      for (int64_t d = 0; d < side.side.size; ++d) {
        const Vec x = load(side.columns + d * stride_ + j);
        squares += x * x;
      }
      store(to + j, squares * side.scale);
      most = maximum(most, squares);
    }
    return largest(most) * __builtin_fabsf(side.scale);
  }

  void forward_triangle(const float* differences) {
    const BoundedSums sums = {zeros(stride_), zeros(stride_), zeros(stride_), differences};
    for_tiles([&](auto constant, int64_t row, int rows) {
      for_blocks<decltype(constant)::value>(row, length_, [&](int64_t first, int64_t count) {
        for_groups(rows, [&](auto group, int r) {
          see_both<decltype(group)::value>(scores_t_ + r * kRelationStride, scores_s_ + r * kRelationStride, count,
                                           row + rows - first, kFactor, kFactor, sums.from(row + r), sums.from(first));
        });
      });
      for (int64_t i = row; i < row + rows; ++i)
        write_statistics(i, {0.0f, 0.0f, sums.total_t[i], sums.total_s[i], sums.dot[i]}, differences[i]);
    });
  }

  void backward_triangle() {
    float *reciprocals_t = zeros(stride_), *reciprocals_s = zeros(stride_);
    write_reciprocals(p_.teacher, reciprocals_t);
    write_reciprocals(p_.student, reciprocals_s);
    for_tiles([&](auto constant, int64_t row, int rows) {
      constexpr int kPadded = decltype(constant)::value;
      for_blocks<kPadded>(row, length_, [&](int64_t first, int64_t count) {
        for_groups(rows, [&](auto group, int r) {
          take_both_gradients<decltype(group)::value>(scores_t_ + r * kRelationStride, scores_s_ + r * kRelationStride,
                                                      count, row + rows - first, kFactor, kFactor,
                                                      {reciprocals_t + row + r, reciprocals_s + row + r},
                                                      {reciprocals_t + first, reciprocals_s + first});
        });
        add_row_sums<kPadded>(scores_s_, values_ + first * width_, count, width_, row_sums_ + row * width_);
        add_column_sums(student_.rows, scores_s_, rows, p_.student.size, count, stride_, column_sums_ + first);
      });
    });
  }

  alignas(64) float scores_t_[kTileRows * kRelationStride];
  alignas(64) float scores_s_[kTileRows * kRelationStride];
  int64_t stride_, width_;
  float* memory_;
  UnpackedSide teacher_, student_;
  float *values_ = nullptr, *column_sums_ = nullptr, *row_sums_ = nullptr;
};

inline void relation_kl_forward(const RelationProblem& problem, const RelationTask& task, float* scratch) {
  RelationHead(problem, task, scratch).forward();
}

inline void relation_kl_backward(const RelationProblem& problem, const RelationTask& task, float* scratch) {
  RelationHead(problem, task, scratch).backward();
}

}  // namespace
}  // namespace minilm_fast
