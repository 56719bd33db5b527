// Which instruction set the kernels use: found once at start, can be forced. One build holds them all.
#pragma once

namespace engram {

enum class Isa { baseline, avx2, avx512, neon };

Isa active_isa();                      // the best that this processor has, unless forced
const char* isa_name(Isa isa);         // "baseline", "avx2", "avx512", "neon"
bool isa_available(Isa isa);           // built in, and this processor has it
void force_isa(Isa isa);               // for tests and benchmarks; isa_available must hold

}  // namespace engram
