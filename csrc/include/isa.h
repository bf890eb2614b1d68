#pragma once

#include <string>

namespace minilm_fast {

// Instruction sets in ascending order: each one includes those before it.
enum class Isa { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAvx512Bf16 = 4, kAmx = 5 };

// The best set that this processor and operating system offer, lowered by MINILM_FAST_CPU_ISA if that is set.
// Decided at the first call, except that set_isa can lower it (for tests).
Isa current_isa();

// Lowers or restores the set in use. Throws std::invalid_argument for an unknown name or one the CPU lacks.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace minilm_fast
