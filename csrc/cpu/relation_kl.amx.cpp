#include <type_traits>

#include "amx_tile.h"
#include "relation_kl_kernel.h"
#include "relation_square.h"

namespace minilm_fast {
namespace {

constexpr int kAmxRows = 2 * kTileSide;
constexpr int64_t kAmxColumns = 2 * kTileSide;
constexpr int64_t kScoreBytes = kRelationStride * sizeof(float);

// One side's data as operands of products of tiles.
struct PackedSide {
  const RelationSide& side;
  float factor, sign;
  int64_t depth;      // tiles along the dimensions
  uint32_t* columns;  // b as right operands, by pack_columns: 16 columns after the other, a multiple of 32
  uint32_t* rows;     // 32 rows of a as left operands, by pack_rows
};

// Scores of 32 rows with `count` columns, rounded up to a multiple of 32.
inline void relate(const uint32_t* rows, const uint32_t* columns, int64_t depth, int64_t count, float* scores) {
  for (int64_t j = 0; j < count; j += kAmxColumns, columns += 2 * depth * kTileWords) {
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t k = 0; k < depth; ++k) {
      _tile_loadd(0, rows + k * kTileWords, kTileLine);
      _tile_loadd(1, rows + (depth + k) * kTileWords, kTileLine);
      _tile_loadd(2, columns + k * kTileWords, kTileLine);
      _tile_loadd(3, columns + (depth + k) * kTileWords, kTileLine);
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(5, 0, 3);
      _tile_dpbf16ps(6, 1, 2);
      _tile_dpbf16ps(7, 1, 3);
    }
    float* second = scores + j + kTileSide * kRelationStride;
    _tile_stored(4, scores + j, kScoreBytes);
    _tile_stored(5, scores + j + kTileSide, kScoreBytes);
    _tile_stored(6, second, kScoreBytes);
    _tile_stored(7, second + kTileSide, kScoreBytes);
  }
}

struct Buffers {
  alignas(64) float scores_t[kAmxRows * kRelationStride];
  alignas(64) float scores_s[kAmxRows * kRelationStride];
  // The gradients in bf16. As left operands: a row has one word for columns j and j + 16 of every 32. As right ones:
  // a tile for every 16 columns, whose line r has rows r and r + 16.
  alignas(64) uint32_t lefts[kAmxRows * kRelationBlock / 2];
  alignas(64) uint32_t rights[kRelationBlock * kTileSide];
};

// Of triangles: scores of two squares, of which one is worked on while the other is made, and what becomes of them.
struct TriangleBuffers {
  alignas(64) float scores[2][2 * kSquare];  // of the teacher and of the student
  SquareSums sums;
  SquareGradients gradients[2];
};

class AmxRelationHead : RelationRows {
 public:
  AmxRelationHead(const RelationProblem& problem, const RelationTask& task, float* scratch, Buffers& buffers,
                  TriangleBuffers& squares)
      : RelationRows(problem, task),
        b_(buffers),
        s_(squares),
        padded_(round_up(length_, kAmxColumns)),
        stride_((padded_ / kTileSide | 1) * kTileSide),
        width_(round_up(problem.student.size, kTileSide)),
        memory_(scratch),
        teacher_(set_up(problem.teacher)),
        student_(set_up(problem.student)) {}

  void forward() {
    if (is_triangle()) return forward_triangle();
    for_tiles([&](int64_t row, int rows) { forward_tile(row, rows); });
  }

  void backward() {
    values_ = words(padded_ / 2 * width_);
    for (int64_t j = 0; j < length_; j += kTileDepth)
      pack_values([&](int64_t i) { return b_row(p_.student, j + i); }, length_ - j, p_.student.size,
                  values_ + j / 2 * width_);
    turned_ = words(kTileSide * width_);
    column_sums_ = zeros(width_ * stride_);
    row_sums_ = zeros((t_.row_end - t_.row_begin + kAmxRows) * width_);
    if (is_triangle())
      backward_triangle();
    else
      for_tiles([&](int64_t row, int rows) { backward_tile(row, rows); });
    write_gradients(row_sums_, width_, column_sums_, stride_, __builtin_fabs(p_.student.scale));
  }

 private:
  float* take(int64_t floats) {
    float* memory = memory_;
    memory_ += round_up(floats, kTileSide);
    return memory;
  }

  uint32_t* words(int64_t count) { return reinterpret_cast<uint32_t*>(take(count)); }

  float* zeros(int64_t floats) {
    float* memory = take(floats);
    std::memset(memory, 0, sizeof(float) * floats);
    return memory;
  }

  const Bf16* a_row(const RelationSide& side, int64_t row) const {
    return static_cast<const Bf16*>(side.a.data) + (t_.first + row) * side.a.token + t_.head * side.a.head;
  }
  const Bf16* b_row(const RelationSide& side, int64_t row) const {
    return static_cast<const Bf16*>(side.b.data) + (t_.first + row) * side.b.token + t_.head * side.b.head;
  }

  // Of a side's scores: positive, so that the greatest score stays the greatest.
  static float factor(const RelationSide& side) {
    const double size = side.scale < 0 ? -side.scale : side.scale;
    return static_cast<float>((size == 0 ? 1.0 : size) * kLog2E);
  }

  // The sign of the scale, which is in the rows; zero if there is nothing of them in the scores.
  static float sign(const RelationSide& side) { return side.scale > 0 ? 1.0f : side.scale < 0 ? -1.0f : 0.0f; }

  PackedSide set_up(const RelationSide& side) {
    const int64_t depth = round_up(side.size, kTileDepth) / kTileDepth, tile = depth * kTileWords;
    uint32_t* columns = words(padded_ / kTileSide * tile);
    pack_columns([&](int64_t j) { return b_row(side, j); }, length_, side.size, columns);
    const int64_t packed = round_up(length_, kTileSide);
    std::memset(columns + packed / kTileSide * tile, 0, sizeof(uint32_t) * (padded_ - packed) / kTileSide * tile);
    return {side, factor(side), sign(side), depth, columns, words(2 * tile)};
  }

  void pack_side_rows(const PackedSide& side, int64_t row, int rows) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t left = rows - i * kTileSide;
      pack_rows([&](int64_t r) { return a_row(side.side, row + i * kTileSide + r); },
                left < kTileSide ? left : kTileSide, side.side.size, side.rows + i * side.depth * kTileWords);
    }
    apply_sign(side.sign, side.rows, 2 * side.depth * kTileWords);
  }

  static void apply_sign(float sign, uint32_t* words, int64_t count) {
    if (sign == 1.0f) return;
    for (int64_t i = 0; i < count; ++i) words[i] = sign == 0.0f ? 0 : words[i] ^ 0x80008000u;
  }

  template <class F>
  void for_tiles(F f) {
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kAmxRows) {
      const int64_t left = t_.row_end - row;
      const int rows = static_cast<int>(left < kAmxRows ? left : kAmxRows);
      pack_side_rows(teacher_, row, rows);
      pack_side_rows(student_, row, rows);
      f(row, rows);
    }
  }

  // Calls f(first, count) for blocks of the columns [begin, end) after both sides' scores with them are there; begin is
  // a multiple of 32.
  template <class F>
  void for_blocks(int64_t begin, int64_t end, F f) {
    for (int64_t first = begin; first < end; first += kRelationBlock) {
      const int64_t count = end - first < kRelationBlock ? end - first : kRelationBlock;
      memory_fence();
      relate(teacher_.rows, teacher_.columns + first * teacher_.depth * kTileSide, teacher_.depth, count, b_.scores_t);
      relate(student_.rows, student_.columns + first * student_.depth * kTileSide, student_.depth, count, b_.scores_s);
      memory_fence();
      f(first, count);
    }
  }

  float own_score(const PackedSide& side, int64_t row) const {
    const Bf16 *a = a_row(side.side, row), *b = b_row(side.side, row);
    float score = 0.0f;
    for (int64_t d = 0; d < side.side.size; ++d) score += to_float(a[d]) * to_float(b[d]);
    return score * side.sign * side.factor;
  }

  void forward_tile(int64_t row, int rows) {
    RowState states[kAmxRows];
    for (int r = 0; r < rows; ++r)
      states[r] =
          is_pseudo(row + r) ? RowState{own_score(teacher_, row + r), own_score(student_, row + r), 1, 1, 0} : unseen();
    for_blocks(0, visible_columns(row, row + rows), [&](int64_t first, int64_t count) {
      for (int r = 0; r < rows; ++r) {
        const int64_t left = prefix(row + r) - first, seen = left < count ? left : count;
        if (seen <= 0) continue;
        see_columns(states[r], b_.scores_t + r * kRelationStride, b_.scores_s + r * kRelationStride, seen,
                    teacher_.factor, student_.factor);
      }
    });
    for (int r = 0; r < rows; ++r) write_statistics(row + r, states[r]);
  }

  void backward_tile(int64_t row, int rows) {
    float* row_sums = row_sums_ + (row - t_.row_begin) * width_;
    RowNorm norm_t[kAmxRows], norm_s[kAmxRows];
    for (int r = 0; r < rows; ++r) {
      norm_t[r] = row_norm(lse(p_.teacher, row + r));
      norm_s[r] = row_norm(lse(p_.student, row + r));
      if (is_pseudo(row + r)) add_own_gradient(row + r, norm_t[r], norm_s[r], row_sums + r * width_);
    }
    turn_rows(row, rows);
    for_blocks(0, visible_columns(row, row + rows), [&](int64_t first, int64_t count) {
      for (int r = 0; r < rows; ++r) {
        const int64_t left = prefix(row + r) - first, seen = left < count ? left : count;
        take_gradients(b_.scores_t + r * kRelationStride, b_.scores_s + r * kRelationStride, seen > 0 ? seen : 0,
                       round_up(count, kAmxColumns), teacher_.factor, student_.factor, norm_t[r], norm_s[r]);
      }
      add_products(first, count, row_sums);
    });
  }

  void add_own_gradient(int64_t row, RowNorm norm_t, RowNorm norm_s, float* row_sums) {
    const float gradient = own_gradient(own_score(teacher_, row), own_score(student_, row), norm_t, norm_s);
    const Bf16 *a = a_row(p_.student, row), *b = b_row(p_.student, row);
    for (int64_t d = 0; d < p_.student.size; ++d) {
      row_sums[d] += gradient * to_float(b[d]);
      column_sums_[d * stride_ + row] += gradient * student_.sign * to_float(a[d]);
    }
  }

  // The student's rows as left operands whose rows are the dimensions: a word has rows r and r + 16.
  void turn_rows(int64_t row, int rows) {
    pack_values([&](int64_t r) { return a_row(p_.student, row + r); }, rows, p_.student.size, turned_);
    for (int64_t d = 0; d < width_; d += kTileSide) {
      Vec square[kTileSide];
      std::memcpy(square, turned_ + d * kTileSide, sizeof(square));
      transpose(square);
      std::memcpy(turned_ + d * kTileSide, square, sizeof(square));
    }
    apply_sign(student_.sign, turned_, width_ * kTileSide);
  }

  // Adds the products of the gradients, which are in the place of the student's scores, to the sums of the rows and to
  // those of the columns.
  void add_products(int64_t first, int64_t count, float* row_sums) {
    const int64_t steps = round_up(count, kTileDepth) / kTileDepth;
    to_operands(steps);
    memory_fence();
    for (int64_t d = 0; d < width_; d += kTileSide) {
      add_row_products(steps, values_ + first / 2 * width_ + d * kTileSide, row_sums + d);
      add_column_products(steps, turned_ + d * kTileSide, column_sums_ + d * stride_ + first);
    }
    memory_fence();
  }

  void to_operands(int64_t steps) {
    for (int64_t r = 0; r < kTileSide; ++r) {
      const float *upper = b_.scores_s + r * kRelationStride, *lower = upper + kTileSide * kRelationStride;
      uint32_t* lefts = b_.lefts + r * kRelationBlock / 2;
      uint32_t* rights = b_.rights + r * kTileSide;
      for (int64_t i = 0; i < steps; ++i) {
        const Vec a = load(upper), b = load(upper + kTileSide), c = load(lower), d = load(lower + kTileSide);
        store_words(lefts, to_words(a, b));
        store_words(lefts + kTileSide * kRelationBlock / 2, to_words(c, d));
        store_words(rights, to_words(a, c));
        store_words(rights + kTileWords, to_words(b, d));
        upper += kTileDepth;
        lower += kTileDepth;
        lefts += kTileSide;
        rights += 2 * kTileWords;
      }
    }
  }

  // Of 16 dimensions: both tiles of rows.
  void add_row_products(int64_t steps, const uint32_t* values, float* sums) {
    const int64_t bytes = width_ * sizeof(float);
    constexpr int64_t kLeftBytes = kRelationBlock / 2 * sizeof(uint32_t);
    _tile_loadd(4, sums, bytes);
    _tile_loadd(5, sums + kTileSide * width_, bytes);
    for (int64_t i = 0; i < steps; ++i) {
      _tile_loadd(2, values + i * kTileSide * width_, kTileLine);
      _tile_loadd(0, b_.lefts + i * kTileSide, kLeftBytes);
      _tile_loadd(1, b_.lefts + i * kTileSide + kTileSide * kRelationBlock / 2, kLeftBytes);
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(5, 1, 2);
    }
    _tile_stored(4, sums, bytes);
    _tile_stored(5, sums + kTileSide * width_, bytes);
  }

  // Of 16 dimensions: every tile of columns.
  void add_column_products(int64_t steps, const uint32_t* turned, float* sums) {
    const int64_t bytes = stride_ * sizeof(float);
    _tile_loadd(0, turned, kTileLine);
    for (int64_t i = 0; i < steps; ++i, sums += kTileDepth) {
      _tile_loadd(6, sums, bytes);
      _tile_loadd(7, sums + kTileSide, bytes);
      _tile_loadd(2, b_.rights + 2 * i * kTileWords, kTileLine);
      _tile_loadd(3, b_.rights + (2 * i + 1) * kTileWords, kTileLine);
      _tile_dpbf16ps(6, 0, 2);
      _tile_dpbf16ps(7, 0, 3);
      _tile_stored(6, sums, bytes);
      _tile_stored(7, sums + kTileSide, bytes);
    }
  }

  // Whether the task is a triangle and no score can be so large that a maximum must be subtracted.
  bool is_triangle() const {
    if (!t_.triangle) return false;
    // Norms bound all scores of a symmetric relation. One that is no number is not bounded.
    const Vec most = splat(kBounded);
    for (int64_t j = 0; j < padded_; j += kTileSide)
      if (_mm512_cmp_ps_mask(squared_norms(teacher_, j), most, _CMP_NLE_UQ) |
          _mm512_cmp_ps_mask(squared_norms(student_, j), most, _CMP_NLE_UQ))
        return false;
    return true;
  }

  // Of the columns from j on, times the factor.
  static Vec squared_norms(const PackedSide& side, int64_t j) {
    const uint32_t* words = side.columns + j * side.depth * kTileSide;
    Vec sum = {};
    for (int64_t d = 0; d < side.side.size; d += 2, words += kTileSide) {
      const BitVec pair = load_bits(words);
      const Vec low = reinterpret_cast<Vec>(pair << 16), high = reinterpret_cast<Vec>(pair & 0xffff0000u);
      sum += low * low + high * high;
    }
    return sum * side.factor;
  }

  // One of eight products, in tile 4 or 5: scores of 16 rows with 16 of the 32 columns from `first` on, of one side.
  void multiply_scores(int i, int64_t first) const {
    const PackedSide& side = i < kChunks / 2 ? teacher_ : student_;
    const uint32_t* rows = side.rows + i / 2 % 2 * side.depth * kTileWords;
    const uint32_t* columns = side.columns + (first + i % 2 * kTileSide) * side.depth * kTileSide;
    const bool even = i % 2 == 0;
    if (even)
      _tile_zero(4);
    else
      _tile_zero(5);
    for (int64_t k = 0; k < side.depth; ++k) {
      _tile_loadd(0, rows + k * kTileWords, kTileLine);
      _tile_loadd(2, columns + k * kTileWords, kTileLine);
      if (even)
        _tile_dpbf16ps(4, 0, 2);
      else
        _tile_dpbf16ps(5, 0, 2);
    }
  }

  static void store_scores(int i, float* scores) {
    constexpr int kHalf = kChunks / 2;
    float* to = scores + i / kHalf * kSquare + i / 2 % 2 * kSquare / 2 + i % 2 * kTileSide;
    if (i % 2 == 0)
      _tile_stored(4, to, kSquareSide * sizeof(float));
    else
      _tile_stored(5, to, kSquareSide * sizeof(float));
  }

  // Step i of kChunks + 1 that make the scores of a square: a product is stored only in the step after its own, when it
  // has long been there.
  void score_step(int i, int64_t first, float* scores) const {
    if (i > 0) store_scores(i - 1, scores);
    if (i < kChunks) multiply_scores(i, first);
  }

  // Calls f(n, first, scores, between) for the squares of 32 rows from the diagonal on, in order.
  template <class F>
  void for_squares(int64_t row, F f) {
    memory_fence();
    for (int i = 0; i <= kChunks; ++i) score_step(i, row, s_.scores[0]);
    memory_fence();
    int n = 0;
    for (int64_t first = row; first < length_; first += kSquareSide, ++n) {
      const int64_t next = first + kSquareSide;
      float* to = s_.scores[1 - n % 2];
      f(n, first, s_.scores[n % 2], [&](int chunk) {
        if (next < length_) score_step(chunk, next, to);
      });
      if (next < length_) score_step(kChunks, next, to);
      memory_fence();
    }
  }

  // Calls f(mirrored, whole) with constants.
  template <class F>
  static void with_kind(bool mirrored, bool whole, F f) {
    using Yes = std::true_type;
    using No = std::false_type;
    if (mirrored)
      whole ? f(Yes(), Yes()) : f(Yes(), No());
    else
      whole ? f(No(), Yes()) : f(No(), No());
  }

  void forward_triangle() {
    const ColumnSums sums = {zeros(stride_), zeros(stride_), zeros(stride_)};
    for_tiles([&](int64_t row, int rows) {
      s_.sums = {};
      for_squares(row, [&](int n, int64_t first, const float* scores, auto between) {
        const SquareColumns columns(length_ - first);
        with_kind(n > 0, columns.whole, [&](auto mirrored, auto whole) {
          see_square<mirrored, whole>(scores, scores + kSquare, teacher_.factor, student_.factor, columns, s_.sums,
                                      sums.from(first), between);
        });
      });
      add_rows(s_.sums.total_t, sums.total_t + row);
      add_rows(s_.sums.total_s, sums.total_s + row);
      add_rows(s_.sums.dot, sums.dot + row);
      for (int half = 0; half < rows; half += kTileSide)
        write_bounded_statistics(row + half, rows - half, sums.from(row + half));
    });
  }

  // What write_statistics writes, of up to 16 rows.
  void write_bounded_statistics(int64_t row, int count, const ColumnSums& sums) const {
    const int64_t i = t_.head * p_.tokens + t_.first + row;
    const Vec total_t = load(sums.total_t), total_s = load(sums.total_s), mean = load(sums.dot) / total_t;
    for (int half = 0; half < 2; ++half) {
      const int first = half * kLanes / 2;
      const __mmask8 mask = first_bits<__mmask8>(count - first);
      const __m512d log_t = logarithm(widen(total_t, half)), log_s = logarithm(widen(total_s, half));
      _mm512_mask_storeu_pd(p_.teacher.lse + i + first, mask, log_t);
      _mm512_mask_storeu_pd(p_.student.lse + i + first, mask, log_s);
      const __m512d divergence = widen(mean, half) * kLn2 - log_t + log_s;
      _mm256_mask_storeu_ps(p_.divergence + i + first, mask, _mm512_cvtpd_ps(divergence));
    }
  }

  static void add_rows(const Vec (&partial)[kSquareSide], float* to) {
    for (int half = 0; half < 2; ++half, to += kTileSide)
      store(to, load(to) + combine_rows(partial + half * kTileSide, [](Vec a, Vec b) { return a + b; }));
  }

  void backward_triangle() {
    float *reciprocals_t = zeros(stride_), *reciprocals_s = zeros(stride_);
    write_bounded_reciprocals(p_.teacher, reciprocals_t);
    write_bounded_reciprocals(p_.student, reciprocals_s);
    auto reciprocals = [&](int64_t i) { return Reciprocals{reciprocals_t + i, reciprocals_s + i}; };
    for_tiles([&](int64_t row, int rows) {
      turn_rows(row, rows);
      int64_t last = row;
      for_squares(row, [&](int n, int64_t first, const float* scores, auto between) {
        const SquareColumns columns(length_ - first);
        with_kind(n > 0, columns.whole, [&](auto mirrored, auto whole) {
          take_square<mirrored, whole>(scores, scores + kSquare, teacher_.factor, student_.factor, columns,
                                       reciprocals(row), reciprocals(first), s_.gradients[n % 2], [&](int chunk) {
                                         between(chunk);
                                         if (n > 0 && chunk == kChunks / 2)
                                           multiply_square(s_.gradients[1 - n % 2], row, last);
                                       });
        });
        last = first;
      });
      multiply_square(s_.gradients[(last - row) / kSquareSide % 2], row, last);
    });
  }

  void write_bounded_reciprocals(const RelationSide& side, float* to) const {
    const double* lse = side.lse + t_.head * p_.tokens + t_.first;
    int64_t j = 0;
    for (; j + kLanes <= length_; j += kLanes) store(to + j, negative_exponential(lse + j));
    if (j == length_) return;
    double last[kLanes] = {};
    std::memcpy(last, lse + j, sizeof(double) * (length_ - j));
    store(to + j, first_lanes(length_ - j, negative_exponential(last), Vec{}));
  }

  // Adds the products of the gradients of 32 rows and the 32 columns from `first` on to the sums of both.
  void multiply_square(const SquareGradients& gradients, int64_t row, int64_t first) {
    const int64_t row_bytes = width_ * sizeof(float), column_bytes = stride_ * sizeof(float);
    memory_fence();
    for (int64_t d = 0; d < width_; d += kTileSide) {
      float* rows = row_sums_ + row * width_ + d;
      _tile_loadd(6, rows, row_bytes);
      _tile_loadd(7, rows + kTileSide * width_, row_bytes);
      _tile_loadd(3, values_ + first / 2 * width_ + d * kTileSide, kTileLine);
      _tile_loadd(1, gradients.lefts, kTileLine);
      _tile_dpbf16ps(6, 1, 3);
      _tile_loadd(1, gradients.lefts + kTileWords, kTileLine);
      _tile_dpbf16ps(7, 1, 3);
      _tile_stored(6, rows, row_bytes);
      _tile_stored(7, rows + kTileSide * width_, row_bytes);
      float* columns = column_sums_ + d * stride_ + first;
      _tile_loadd(6, columns, column_bytes);
      _tile_loadd(7, columns + kTileSide, column_bytes);
      _tile_loadd(1, turned_ + d * kTileSide, kTileLine);
      _tile_loadd(3, gradients.rights, kTileLine);
      _tile_dpbf16ps(6, 1, 3);
      _tile_loadd(3, gradients.rights + kTileWords, kTileLine);
      _tile_dpbf16ps(7, 1, 3);
      _tile_stored(6, columns, column_bytes);
      _tile_stored(7, columns + kTileSide, column_bytes);
    }
    memory_fence();
  }

  Buffers& b_;
  TriangleBuffers& s_;
  int64_t padded_, stride_, width_;
  float* memory_;
  PackedSide teacher_, student_;
  uint32_t *values_ = nullptr, *turned_ = nullptr;
  float *column_sums_ = nullptr, *row_sums_ = nullptr;
};

void forward(const RelationProblem& problem, const RelationTask& task, float* scratch) {
  Buffers buffers;
  TriangleBuffers squares;
  TileRegisters registers;
  AmxRelationHead(problem, task, scratch, buffers, squares).forward();
}

void backward(const RelationProblem& problem, const RelationTask& task, float* scratch) {
  Buffers buffers;
  TriangleBuffers squares;
  TileRegisters registers;
  AmxRelationHead(problem, task, scratch, buffers, squares).backward();
}

}  // namespace

const RelationKernels relation_kl_amx = {forward, backward};

}  // namespace minilm_fast
