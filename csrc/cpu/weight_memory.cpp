#include "weight_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace minilm_fast {
namespace {

#if defined(__linux__)

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLine = 64;
// Of addresses; a page takes memory once it is written to.
constexpr size_t kRegion = size_t{64} << 20;

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Addresses that weights are cut from, one after the other; given back with the last of them.
class Region {
 public:
  explicit Region(size_t bytes) : bytes_(bytes + kHugePage) {
    mapped_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!valid()) return;
    const size_t before =
        round_up(reinterpret_cast<uintptr_t>(mapped_), kHugePage) - reinterpret_cast<uintptr_t>(mapped_);
    next_ = static_cast<char*>(mapped_) + before;
    end_ = next_ + bytes;
    madvise(next_, bytes, MADV_HUGEPAGE);
  }
  ~Region() {
    if (valid()) munmap(mapped_, bytes_);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  bool valid() const { return mapped_ != MAP_FAILED; }

  // Null if there is no room.
  char* take(size_t bytes) {
    if (!valid() || static_cast<size_t>(end_ - next_) < bytes) return nullptr;
    char* taken = next_;
    next_ += round_up(bytes, kLine);
    return taken;
  }

 private:
  void* mapped_;
  size_t bytes_;
  char *next_ = nullptr, *end_ = nullptr;
};

#endif

}  // namespace

at::Tensor weight_memory(int64_t bytes) {
  const auto options = at::TensorOptions().dtype(at::kByte);
#if defined(__linux__)
  static std::mutex mutex;
  // Not owned: a region that no weight lies in any more is given back.
  static std::weak_ptr<Region> last;
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> region = last.lock();
  const size_t wanted = round_up(static_cast<size_t>(bytes), kLine);
  char* data = region == nullptr ? nullptr : region->take(wanted);
  if (data == nullptr) {
    region = std::make_shared<Region>(std::max(kRegion, round_up(wanted, kHugePage)));
    data = region->take(wanted);
    if (data != nullptr) last = region;
  }
  if (data != nullptr) return at::from_blob(data, {bytes}, [region](void*) {}, options);
#endif
  return at::empty({bytes}, options);
}

}  // namespace minilm_fast
