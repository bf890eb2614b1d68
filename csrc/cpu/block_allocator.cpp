// Large CPU tensors from blocks that are kept and used again.
//
// A training step over packed sequences allocates tens of blocks of megabytes, of other sizes in every step. From the C
// library's heap they leave holes that fit nothing later, and as mappings of their own each costs a page fault every
// 4 KB. Here a block that was freed serves the next request that it fits. A new one is made only after others were
// given back to the system, if more would be held than the most that was ever in use and a quarter.
#include "block_allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include "huge_pages.h"

namespace minilm_fast {

namespace {

// Smaller requests are the C library's: they cause no page faults worth mentioning.
constexpr size_t kSmallest = size_t{1} << 20;
// A block serves requests down to this part of its size.
constexpr size_t kLargestFit = 2;

#if defined(__linux__)

struct Block {
  void* data;
  size_t bytes;
  size_t asked;  // of which are wanted by the tensor that has it
};

class BlockAllocator final : public c10::Allocator {
 public:
  explicit BlockAllocator(c10::Allocator* small) : small_(small) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return small_->allocate(bytes);
    void* data = take(bytes);
    return {data, data, &BlockAllocator::give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &BlockAllocator::give_back; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  BlockStatistics statistics() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(used_), static_cast<int64_t>(held_), static_cast<int64_t>(peak_)};
  }

 private:
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t rounded = round_to(bytes, kHugePage);
    auto found = free_.lower_bound(rounded);
    Block* block;
    if (found != free_.end() && found->first <= kLargestFit * rounded) {
      block = found->second;
      free_.erase(found);
    } else {
      block = map_new(rounded);
    }
    block->asked = rounded;
    used_ += rounded;
    peak_ = std::max(peak_, used_);
    in_use_.emplace(block->data, block);
    return block->data;
  }

  Block* map_new(size_t bytes) {
    const size_t goal = std::max(peak_, used_ + bytes);
    const size_t most = goal + goal / 4;
    release(most > bytes ? most - bytes : 0);
    void* data = map_huge_pages(bytes);
    if (data == MAP_FAILED) {
      release(0);
      data = map_huge_pages(bytes);
    }
    TORCH_CHECK(data != MAP_FAILED, "not enough memory: you tried to allocate ", bytes, " bytes");
    held_ += bytes;
    return new Block{data, bytes, bytes};
  }

  // Returns free blocks to the system, the smallest first, until no more than `most` bytes are held.
  void release(size_t most) {
    while (held_ > most && !free_.empty()) {
      Block* block = free_.begin()->second;
      free_.erase(free_.begin());
      munmap(block->data, block->bytes);
      held_ -= block->bytes;
      delete block;
    }
  }

  // Of any tensor, also a small one. Only blocks start at a boundary of huge pages, or hardly anything else.
  static void give_back(void* data);

  bool keep(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = in_use_.find(data);
    if (found == in_use_.end()) return false;
    Block* block = found->second;
    in_use_.erase(found);
    used_ -= block->asked;
    free_.emplace(block->bytes, block);
    return true;
  }

  c10::Allocator* small_;
  std::mutex mutex_;
  std::multimap<size_t, Block*> free_;
  std::unordered_map<void*, Block*> in_use_;
  size_t used_ = 0;
  size_t held_ = 0;
  size_t peak_ = 0;
};

// Never destroyed: tensors may outlive everything else.
BlockAllocator* allocator = nullptr;

void BlockAllocator::give_back(void* data) {
  if (reinterpret_cast<uintptr_t>(data) % kHugePage == 0 && allocator->keep(data)) return;
  allocator->small_->raw_deallocate(data);
}

#endif

}  // namespace

#if defined(__linux__)

bool use_block_allocator() {
  if (allocator == nullptr) allocator = new BlockAllocator(c10::GetCPUAllocator());
  c10::SetCPUAllocator(allocator);
  return true;
}

BlockStatistics block_statistics() { return allocator == nullptr ? BlockStatistics{0, 0, 0} : allocator->statistics(); }

#else

bool use_block_allocator() { return false; }

BlockStatistics block_statistics() { return {0, 0, 0}; }

#endif

}  // namespace minilm_fast
