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

  __device__ Sequence(const Attention& p, int index) {
    first = p.cu_seqlens[index];
    length = p.cu_seqlens[index + 1] - first;
    source = p.segments[3 * index];
    end = source + p.segments[3 * index + 1];
    shift = first;
    first_row = 0;
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

// The rows that see the column `column`, and with it those that see any later one: [first, stop) and [second, length),
// in tiles of kRows.
template <int kRows>
struct SeeingRows {
  int first = 0, stop = 0, second, length;

  __device__ SeeingRows(const Sequence& sequence, int column) : second(sequence.length), length(sequence.length) {
    if (column < sequence.source) {
      first = sequence.first_row;
      stop = length;
    } else if (column < sequence.end) {
      // Pseudo rows see one target less than the target rows they stand for.
      const int targets = sequence.end - sequence.source;
      first = min(max(column, sequence.first_row), sequence.end);
      stop = sequence.end;
      second = min(max(max(column + targets + 1, sequence.end), sequence.first_row), length);
    }
  }

  __device__ int first_tiles() const { return (stop - first + kRows - 1) / kRows; }
  __device__ int tiles() const { return first_tiles() + (length - second + kRows - 1) / kRows; }
  __device__ int tile_first(int tile) const {
    const int before = first_tiles();
    return tile < before ? first + tile * kRows : second + (tile - before) * kRows;
  }
  // The end of the rows of a tile that starts at `row`.
  __device__ int tile_stop(int tile, int row) const { return min(row + kRows, tile < first_tiles() ? stop : length); }
};

}  // namespace minilm_fast::cuda
