// The chosen instruction set's hash.
#include "hash.h"

#include "isa.h"

namespace engram {

namespace baseline { extern const HashRows hash_rows; }
#if defined(ENGRAM_X86)
namespace avx2 { extern const HashRows hash_rows; }
namespace avx512 { extern const HashRows hash_rows; }
#elif defined(ENGRAM_ARM)
namespace neon { extern const HashRows hash_rows; }
#endif

HashRows hash_rows() {
    switch (active_isa()) {
#if defined(ENGRAM_X86)
        case Isa::avx512: return avx512::hash_rows;
        case Isa::avx2: return avx2::hash_rows;
#elif defined(ENGRAM_ARM)
        case Isa::neon: return neon::hash_rows;
#endif
        default: return baseline::hash_rows;
    }
}

}  // namespace engram
