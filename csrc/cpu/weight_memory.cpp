#include "weight_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <memory>
#include <mutex>

#include "huge_pages.h"

namespace minilm_fast {
namespace {

#if defined(__linux__)

constexpr size_t kLine = 64;
constexpr size_t kRegion = size_t{64} << 20;

// Memory that weights are cut from, one after the other; given back with the last of them.
class Region {
 public:
  explicit Region(size_t bytes) : bytes_(round_to(bytes, kHugePage)), mapped_(map_huge_pages(bytes_)) {}
  ~Region() {
    if (valid()) munmap(mapped_, bytes_);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Null if there is no room.
  char* take(size_t bytes) {
    const size_t wanted = round_to(bytes, kLine);
    if (!valid() || bytes_ - used_ < wanted) return nullptr;
    char* taken = static_cast<char*>(mapped_) + used_;
    used_ += wanted;
    return taken;
  }

 private:
  bool valid() const { return mapped_ != MAP_FAILED; }

  size_t bytes_;
  void* mapped_;
  size_t used_ = 0;
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
  const size_t wanted = static_cast<size_t>(bytes);
  char* data = region == nullptr ? nullptr : region->take(wanted);
  if (data == nullptr) {
    region = std::make_shared<Region>(std::max(kRegion, wanted));
    data = region->take(wanted);
    if (data != nullptr) last = region;
  }
  if (data != nullptr) return at::from_blob(data, {bytes}, [region](void*) {}, options);
#endif
  return at::empty({bytes}, options);
}

}  // namespace minilm_fast
