#include "isa.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef MINILM_FAST_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minilm_fast {
namespace {

constexpr std::array<const char*, 6> kNames = {"default", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};

#ifdef MINILM_FAST_X86
// Linux hands out the AMX tile state only on request.
bool request_amx() {
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

bool cpuid7_edx(unsigned bit) {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> bit) & 1u;
}

Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kDefault;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Vnni;
  constexpr unsigned kAmxBf16 = 22, kAmxTile = 24, kAmxInt8 = 25;
  if (cpuid7_edx(kAmxBf16) && cpuid7_edx(kAmxTile) && cpuid7_edx(kAmxInt8) && request_amx()) return Isa::kAmx;
  return Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kDefault; }
#endif

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa parse(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) {
      if (static_cast<Isa>(i) > best_isa())
        throw std::invalid_argument("this processor does not have the instruction set '" + name + "'");
      return static_cast<Isa>(i);
    }
  throw std::invalid_argument("unknown instruction set '" + name +
                              "' (default, avx2, avx512, avx512vnni, avx512bf16 or amx)");
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa = [] {
    const char* name = std::getenv("MINILM_FAST_CPU_ISA");
    return static_cast<int>(name && *name ? parse(name) : best_isa());
  }();
  return isa;
}

}  // namespace

Isa current_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

void set_isa(const std::string& name) { chosen().store(static_cast<int>(parse(name))); }

const char* isa_name(Isa isa) { return kNames[static_cast<size_t>(isa)]; }

}  // namespace minilm_fast
