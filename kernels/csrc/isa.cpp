#include "isa.h"

#include <atomic>
#include <initializer_list>

namespace engram {
namespace {

bool processor_has(Isa isa) {
    switch (isa) {
        case Isa::baseline: return true;
#if defined(ENGRAM_X86)
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
        case Isa::avx512:
            return processor_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512cd");
#elif defined(ENGRAM_ARM)
        case Isa::neon: return true;  // part of every 64-bit Arm processor
#endif
        default: return false;
    }
}

Isa best() {
    for (Isa isa : {Isa::avx512, Isa::avx2, Isa::neon})
        if (processor_has(isa)) return isa;
    return Isa::baseline;
}

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best()};
    return isa;
}

}  // namespace

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::neon: return "neon";
        default: return "baseline";
    }
}

bool isa_available(Isa isa) { return processor_has(isa); }

void force_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

}  // namespace engram
