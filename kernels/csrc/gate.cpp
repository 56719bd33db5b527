// The chosen instruction set's gate step.
#include "gate.h"

#include "isa.h"

namespace engram {

namespace baseline { extern const RunGateStep gate_step; }
#if defined(ENGRAM_X86)
namespace avx2 { extern const RunGateStep gate_step; }
namespace avx512 { extern const RunGateStep gate_step; }
#elif defined(ENGRAM_ARM)
namespace neon { extern const RunGateStep gate_step; }
#endif

RunGateStep gate_step() {
    switch (active_isa()) {
#if defined(ENGRAM_X86)
        case Isa::avx512: return avx512::gate_step;
        case Isa::avx2: return avx2::gate_step;
#elif defined(ENGRAM_ARM)
        case Isa::neon: return neon::gate_step;
#endif
        default: return baseline::gate_step;
    }
}

}  // namespace engram
