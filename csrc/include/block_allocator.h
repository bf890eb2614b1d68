// Large CPU tensors from blocks that are kept and used again.
#pragma once

#include <cstdint>

namespace minilm_fast {

struct BlockStatistics {
  int64_t used;  // bytes of blocks in use
  int64_t held;  // bytes of all blocks
  int64_t peak;  // most that were in use
};

// Makes it PyTorch's CPU allocator for the rest of the process; false where the system has no huge pages. Tensors that
// were allocated before live on.
bool use_block_allocator();
BlockStatistics block_statistics();

}  // namespace minilm_fast
