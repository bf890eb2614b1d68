#pragma once

#include "attention_cuda.h"
#include "cuda_device.cuh"

namespace minilm_fast::cuda {

// A sequence of a packed batch. Every mask of the family (minilm_fast/ops/layout.py) lets a row see a prefix of the
// sequence, and a pseudo row itself besides.
struct Sequence {
  int first, length;  // tokens
  int source, end;    // source rows, and those that are not pseudo rows
  int shift;          // what makes a row of q out of a row of the sequence
  int first_row;      // that asks

  // All rows ask.
  __device__ Sequence(const int32_t* cu_seqlens, const int32_t* segments, int index) {
    first = cu_seqlens[index];
    length = cu_seqlens[index + 1] - first;
    source = segments[3 * index];
    end = source + segments[3 * index + 1];
    shift = first;
    first_row = 0;
  }

  __device__ Sequence(const Attention& p, int index) : Sequence(p.cu_seqlens, p.segments, index) {
    if (p.cu_queries == nullptr) return;
    shift = p.cu_queries[index + 1] - length;
    first_row = length - (p.cu_queries[index + 1] - p.cu_queries[index]);
  }

  // How many of the first columns a row sees.
  __device__ int prefix(int row) const {
    if (row < source) return source;
    return row < end ? row + 1 : min(row - (end - source), end);
  }

  // The longest and the shortest prefix of the rows [begin, stop). Within each of the three parts they grow.
  __device__ int longest(int begin, int stop) const {
    int most = prefix(stop - 1);
    if (begin < source) most = max(most, prefix(min(stop, source) - 1));
    if (begin < end) most = max(most, prefix(min(stop, end) - 1));
    return most;
  }
  __device__ int shortest(int begin, int stop) const {
    int least = prefix(begin);
    if (begin < source && source < stop) least = min(least, prefix(source));
    if (begin < end && end < stop) least = min(least, prefix(end));
    return least;
  }
};

// The tiles of kRows rows that see the column `column`, and with it of all that see a later one: [row, stop) in tiles,
// then [second, length).
template <int kRows>
struct SeeingRows {
  int row, stop, second, length;

  __device__ SeeingRows(const Sequence& sequence, int column)
      : row(sequence.first_row), stop(sequence.length), second(sequence.length), length(sequence.length) {
    if (column < sequence.source) return;
    row = max(row, column);
    stop = sequence.end;
    // Pseudo rows see one target less than the target rows they stand for.
    const int targets = sequence.end - sequence.source;
    if (column < sequence.end) second = max(max(column + targets + 1, sequence.end), sequence.first_row);
    if (row >= stop) to_second();
  }

  __device__ bool any() const { return row < stop; }
  // To the next tile, if there is one.
  __device__ void advance() {
    row += kRows;
    if (row >= stop) to_second();
  }

 private:
  __device__ void to_second() {
    row = second;
    second = stop = length;
  }
};

}  // namespace minilm_fast::cuda
