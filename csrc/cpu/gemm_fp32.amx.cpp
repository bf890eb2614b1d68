#include <algorithm>
#include <iterator>

#include "gemm_kernels.h"
#include "gemm_rows.h"
#include "gemm_tiles.h"
#include "scratch.h"

// fp32 on matrix tiles. A number of 24 significant bits is the exact sum of three of bf16: high, middle and low. Of
// the nine products of two such sums the six that reach the last bits of fp32 are computed, the others are below 2^-24
// of the whole (docs/ops/linear.md). Rows are split when they are packed, weights as the rows pass by.
namespace minilm_fast::gemm {
namespace {

constexpr int kParts = 3;
constexpr int32_t kUpperHalf = static_cast<int32_t>(0xffff0000);
constexpr int kHigh = 0, kMiddle = 1, kLow = 2;
constexpr int64_t kStepK = 32;
constexpr int64_t kStepBytes = kParts * kTileBytes;
// Steps whose split weights are kept at a time: with two panels' they fit the second-level cache twice.
constexpr int64_t kChunkSteps = 12;
constexpr int64_t kMaxPanels = 4;
// Panels whose sums are kept from one chunk of k to the next.
constexpr int64_t kStripPanels = 24;

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Parts {
  Int bits[kParts];  // of each part the upper half of a lane
};

// Halves are rounded away from zero: the parts that follow make up for it exactly.
inline Parts split_rounded(Float x) {
  const auto upper_half = [](Float y) { return (as_int(y) + 0x8000) & kUpperHalf; };
  const Int high = upper_half(x);
  const Float rest = x - as_float(high);
  const Int middle = upper_half(rest);
  return {{high, middle, as_int(rest - as_float(middle))}};
}

// As exact, with fewer instructions. All parts have the sign of x: where both sides were split so, the products that
// are left out would have the sign of the whole.
inline Parts split_truncated(Float x) {
  const Float rest = x - as_float(as_int(x) & kUpperHalf);
  return {{as_int(x), as_int(rest), as_int(rest - as_float(as_int(rest) & kUpperHalf))}};
}

template <class T>
void pack_row(const T* row, int64_t k, char* out) {
  for (int64_t i = 0; i < round_up(k, kStepK); i += kWidth) {
    const Parts parts = split_rounded(i < k ? load_part(row + i, k - i) : Float{});
    char* to = out + i / kStepK * kStepBytes + i % kStepK * 2;
    for (int part = 0; part < kParts; ++part, to += kTileBytes)
      store(reinterpret_cast<uint16_t*>(to), as_float(parts.bits[part]));
  }
}

// For each 16 rows and 32 of k a tile of each part.
void pack_rows_split(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  const int64_t group = ceil_divide(k, kStepK) * kStepBytes;
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    pack_row(row, k, static_cast<char*>(rows) + m / kTileRows * group + m % kTileRows * kLine);
  });
}

// A line of a tile of weights, of each part: two k of a panel in fp32.
__attribute__((always_inline)) inline void split_line(Float even, Float odd, char* out) {
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  const Parts a = split_truncated(even), b = split_truncated(odd);
  for (int part = 0; part < kParts; ++part) {
    const Int low = reinterpret_cast<Int>(reinterpret_cast<Unsigned>(a.bits[part]) >> 16);
    store(reinterpret_cast<int32_t*>(out + part * kTileBytes), low | (b.bits[part] & kUpperHalf));
  }
}

// Part of a product: some panels, and a chunk of k.
struct Piece {
  int64_t panel, panels;      // among the product's
  int64_t first_step, steps;  // of k
  bool first, last;           // of the chunks
};

// Splits a piece's weights, a few lines at a time between matrix products. Of each step the panels one after another,
// of each panel a tile of each part. Step i goes to slot i, modulo the number of slots.
class Splitter {
 public:
  static constexpr int64_t kUnit = 4;  // lines

  Splitter(const Product& product, const Piece& piece, int64_t slots, char* memory)
      : k_(product.weight->k),
        panels_(piece.panels),
        panel_floats_(panel_bytes(Format::kFp32, k_) / static_cast<int64_t>(sizeof(float))),
        units_(piece.steps * piece.panels * kUnitsATile),
        slots_(slots),
        step_k_(piece.first_step * kStepK),
        memory_(memory),
        out_(memory) {
    first_ = reinterpret_cast<const float*>(product.weight->panels) +
             (product.column / kPanel + piece.panel) * panel_floats_ + step_k_ * kPanel;
    from_ = first_;
  }

  int64_t units() const { return units_; }
  int64_t units_a_step() const { return panels_ * kUnitsATile; }

  // The next ones, up to a number of all.
  void split(int64_t count, int64_t end) {
    end = std::min(std::min(end, units_), done_ + count);
    for (; done_ < end; ++done_) {
      if (step_k_ + kStepK <= k_)
        for (int64_t i = 0; i < kUnit; ++i)
          split_line(load(from_ + 2 * i * kPanel), load(from_ + (2 * i + 1) * kPanel), out_ + i * kLine);
      else
        split_last();
      from_ += 2 * kUnit * kPanel;
      out_ += kUnit * kLine;
      if (++unit_ == kUnitsATile) next_tile();
    }
  }

 private:
  static constexpr int64_t kUnitsATile = kTileRows / kUnit;

  void next_tile() {
    unit_ = 0;
    out_ += (kParts - 1) * kTileBytes;
    if (++panel_ == panels_) {
      panel_ = 0;
      first_ += kStepK * kPanel;
      step_k_ += kStepK;
      slot_ = slot_ + 1 == slots_ ? 0 : slot_ + 1;
      out_ = memory_ + slot_ * panels_ * kStepBytes;
    }
    from_ = first_ + panel_ * panel_floats_;
  }

  // Of the last step, where k is no multiple of a step's.
  void split_last() {
    const auto line_of = [&](int64_t i) {
      return step_k_ + unit_ * 2 * kUnit + i < k_ ? load(from_ + i * kPanel) : Float{};
    };
    for (int64_t i = 0; i < kUnit; ++i) split_line(line_of(2 * i), line_of(2 * i + 1), out_ + i * kLine);
  }

  const int64_t k_, panels_, panel_floats_, units_, slots_;
  int64_t done_ = 0, unit_ = 0, panel_ = 0, slot_ = 0, step_k_;
  const float *first_, *from_;
  char* const memory_;
  char* out_;
};

// The order of the products of parts: each shares one side with the one before, and the largest comes last.
struct PartPair {
  int row, weight;
};
constexpr PartPair kPairs[] = {{kHigh, kLow},    {kHigh, kMiddle}, {kMiddle, kMiddle},
                               {kMiddle, kHigh}, {kLow, kHigh},    {kHigh, kHigh}};

// One step of one pair of parts: two tiles of rows by two panels, or one tile of rows by up to four panels.
template <int kPair, int kRowTiles, int kPanels>
inline void multiply_parts(const char* rows, int64_t row_tile_stride, const char* weights) {
  constexpr PartPair kNow = kPairs[kPair];
  constexpr bool kNewRows = kPair == 0 || kPairs[kPair ? kPair - 1 : 0].row != kNow.row;
  constexpr bool kNewWeights = kPanels == 4 || kPair == 0 || kPairs[kPair ? kPair - 1 : 0].weight != kNow.weight;
  rows += kNow.row * kTileBytes;
  weights += kNow.weight * kTileBytes;
  if constexpr (kNewRows) _tile_loadd(4, rows, kLine);
  if constexpr (kNewWeights) _tile_loadd(6, weights, kLine);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kRowTiles == 2) {
    if constexpr (kNewRows) _tile_loadd(5, rows + row_tile_stride, kLine);
    _tile_dpbf16ps(1, 5, 6);
  }
  if constexpr (kPanels >= 2) {
    if constexpr (kNewWeights) _tile_loadd(7, weights + kStepBytes, kLine);
    _tile_dpbf16ps(2, 4, 7);
    if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
  if constexpr (kPanels == 4) {
    _tile_loadd(6, weights + 2 * kStepBytes, kLine);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, weights + 3 * kStepBytes, kLine);
    _tile_dpbf16ps(3, 4, 7);
  }
}

// All pairs, with between() after each.
template <int kRowTiles, int kPanels, class Between>
inline void multiply_step(const char* rows, int64_t row_tile_stride, const char* weights, Between between) {
  multiply_parts<0, kRowTiles, kPanels>(rows, row_tile_stride, weights);
  between();
  multiply_parts<1, kRowTiles, kPanels>(rows, row_tile_stride, weights);
  between();
  multiply_parts<2, kRowTiles, kPanels>(rows, row_tile_stride, weights);
  between();
  multiply_parts<3, kRowTiles, kPanels>(rows, row_tile_stride, weights);
  between();
  multiply_parts<4, kRowTiles, kPanels>(rows, row_tile_stride, weights);
  between();
  multiply_parts<5, kRowTiles, kPanels>(rows, row_tile_stride, weights);
  between();
}

class Multiplication {
 public:
  explicit Multiplication(const Product& product)
      : product_(product),
        steps_(ceil_divide(product.weight->k, kStepK)),
        chunks_(ceil_divide(steps_, kChunkSteps)),
        row_tiles_(ceil_divide(product.row_count, kTileRows)),
        pending_{product, {buffers_[0], 0, 0, 0}} {
    static thread_local Scratch scratch;
    constexpr int64_t kWeightBytes = kMaxPanels * kChunkSteps * kStepBytes;
    const int64_t sum_bytes = chunks_ > 1 ? row_tiles_ * kStripPanels * kTileBytes : 0;
    char* memory = scratch.get(2 * kWeightBytes + sum_bytes);
    weights_[0] = memory;
    weights_[1] = memory + kWeightBytes;
    kept_sums_ = reinterpret_cast<float*>(memory + 2 * kWeightBytes);
  }

  void run() {
    const int64_t panels = ceil_divide(product_.columns, kPanel), width = row_tiles_ > 1 ? 2 : 4;
    list_pieces(panels, width);
    if (row_tiles_ <= 2)
      run_at_once();
    else
      run_in_turn();
    pending_.finish_up_to(pending_.rows);
  }

 private:
  // A piece's weights are used once: each step is split while the one before is multiplied.
  void run_at_once() {
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece piece = piece_at(i);
      Splitter splitter(product_, piece, 2, weights_[0]);
      splitter.split(splitter.units_a_step(), splitter.units());
      multiply_piece(piece, {weights_[0], 2, splitter, splitter.units_a_step(), splitter.units_a_step()});
    }
  }

  // Many rows pass by a piece's weights, while those of the next are split.
  void run_in_turn() {
    Piece piece = piece_at(0);
    Splitter(product_, piece, kChunkSteps, weights_[0]).split(INT64_MAX / 2, INT64_MAX / 2);
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece next = i + 1 < pieces_ ? piece_at(i + 1) : Piece{};
      Splitter splitter(product_, next, kChunkSteps, weights_[(i + 1) % 2]);
      const int64_t steps = ceil_divide(row_tiles_, 2) * piece.steps;
      multiply_piece(piece,
                     {weights_[i % 2], kChunkSteps, splitter, ceil_divide(splitter.units(), steps), splitter.units()});
      splitter.split(splitter.units(), splitter.units());
      piece = next;
    }
  }

  // Strips of panels; in each the chunks of k; in each the panels, `width` at a time.
  void list_pieces(int64_t panels, int64_t width) {
    panels_ = panels;
    width_ = width;
    pieces_ = 0;
    for (int64_t strip = 0; strip < panels; strip += kStripPanels)
      pieces_ += chunks_ * groups(std::min(kStripPanels, panels - strip));
  }

  // Of `width` panels each; three that are left are two and one.
  int64_t groups(int64_t panels) const { return panels / width_ + (panels % width_ + 1) / 2; }

  Piece piece_at(int64_t index) const {
    int64_t strip = 0, in_strip;
    while (index >= (in_strip = chunks_ * groups(std::min(kStripPanels, panels_ - strip)))) {
      index -= in_strip;
      strip += kStripPanels;
    }
    const int64_t panels = std::min(kStripPanels, panels_ - strip), per_chunk = groups(panels);
    const int64_t chunk = index / per_chunk, group = index % per_chunk;
    const int64_t whole = panels / width_;
    const int64_t begin = group <= whole ? group * width_ : whole * width_ + (group - whole) * 2;
    const int64_t count = group < whole ? width_ : std::min<int64_t>(2, panels - begin);
    const int64_t first = chunk * steps_ / chunks_, end = (chunk + 1) * steps_ / chunks_;
    return {strip + begin, count, first, end - first, chunk == 0, chunk == chunks_ - 1};
  }

  // Split weights, and what is to be split meanwhile.
  struct Weights {
    const char* slots;
    int64_t slot_count;
    Splitter& splitter;
    int64_t units_a_step;
    int64_t ahead;  // after n steps no more than n * units_a_step + ahead units
  };

  void multiply_piece(const Piece& piece, const Weights& weights) {
    if (piece.panels == 4)
      multiply_rows<1, 4>(piece, weights);
    else if (piece.panels == 2)
      multiply_rows<2, 2>(piece, weights);
    else
      multiply_rows<2, 1>(piece, weights);
  }

  template <int kRowTiles, int kPanels>
  void multiply_rows(const Piece& piece, const Weights& weights) {
    for (int64_t tile = 0; tile < row_tiles_; tile += kRowTiles) {
      if (kRowTiles == 2 && tile + 1 == row_tiles_)
        multiply_block<1, kPanels>(piece, tile, weights);
      else
        multiply_block<kRowTiles, kPanels>(piece, tile, weights);
    }
  }

  template <int kRowTiles, int kPanels>
  void multiply_block(const Piece& piece, int64_t tile, const Weights& weights) {
    const char* rows = static_cast<const char*>(product_.rows.data) + (tile * steps_ + piece.first_step) * kStepBytes;
    float* kept = kept_sums_ + (piece.panel % kStripPanels * row_tiles_ + tile * kPanels) * kTileRows * kPanel;
    const int64_t finish_rows_a_step = ceil_divide(pending_.rows, piece.steps);
    const int64_t units_a_pair = ceil_divide(weights.units_a_step, static_cast<int64_t>(std::size(kPairs)));
    zero_sums();
    for (int64_t step = 0; step < piece.steps; ++step) {
      const char* slot = weights.slots + step % weights.slot_count * kPanels * kStepBytes;
      const int64_t end = (step + 1) * weights.units_a_step + weights.ahead;
      multiply_step<kRowTiles, kPanels>(rows + step * kStepBytes, steps_ * kStepBytes, slot,
                                        [&] { weights.splitter.split(units_a_pair, end); });
      pending_.finish_up_to((step + 1) * finish_rows_a_step);
    }
    float* sums = !piece.last || !piece.first ? kept : pending_.sums.data == buffers_[0] ? buffers_[1] : buffers_[0];
    if (piece.first) {
      store_sums<kRowTiles, kPanels>(sums);
    } else {
      // A chain of additions for each chunk keeps rounding errors small.
      alignas(64) float chunk[kRowTiles * kTileRows * kPanels * kPanel];
      store_sums<kRowTiles, kPanels>(chunk);
      for (int64_t i = 0; i < kRowTiles * kTileRows * kPanels * kPanel; i += kWidth)
        store(sums + i, load(sums + i) + load(chunk + i));
    }
    if (!piece.last) return;
    const int64_t row = tile * kTileRows;
    pending_.sums = {sums, row, piece.panel, kPanels};
    pending_.next = 0;
    pending_.rows = std::min(kRowTiles * kTileRows, product_.row_count - row);
  }

  const Product& product_;
  const int64_t steps_, chunks_, row_tiles_;
  int64_t panels_ = 0, width_ = 0, pieces_ = 0;
  char* weights_[2];
  float* kept_sums_;
  alignas(64) float buffers_[2][4 * kTileRows * kPanel];
  Pending<float> pending_;
};

void multiply_split(const Product& product) {
  if (product.row_count == 0 || product.columns == 0) return;
  const TileRegisters registers;
  Multiplication(product).run();
}

}  // namespace

const Kernels kAmxFp32 = {2 * kParts, kStepK, kTileRows, false, pack_rows_split, multiply_split};

}  // namespace minilm_fast::gemm
