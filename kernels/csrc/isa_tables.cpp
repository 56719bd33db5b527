#include "isa_tables.h"

#include "isa.h"

#define ENGRAM_DECLARE(isa)                  \
    namespace isa {                          \
    extern const RowTable row_table;         \
    extern const HashRows hash_rows;         \
    extern const HashRows hash_sums;         \
    extern const RunGateStep gate_step;      \
    extern const RunProject project;         \
    extern const EncodeTable encode_table;   \
    }
#define ENGRAM_TABLE(isa) \
    IsaTable{&isa::row_table, isa::hash_rows, isa::hash_sums, isa::gate_step, isa::project, &isa::encode_table}

namespace engram {

ENGRAM_DECLARE(baseline)
#if defined(ENGRAM_X86)
ENGRAM_DECLARE(avx2)
ENGRAM_DECLARE(avx512)
#elif defined(ENGRAM_ARM)
ENGRAM_DECLARE(neon)
#endif

IsaTable active_table() {
    switch (active_isa()) {
#if defined(ENGRAM_X86)
        case Isa::avx512: return ENGRAM_TABLE(avx512);
        case Isa::avx2: return ENGRAM_TABLE(avx2);
#elif defined(ENGRAM_ARM)
        case Isa::neon: return ENGRAM_TABLE(neon);
#endif
        default: return ENGRAM_TABLE(baseline);
    }
}

}  // namespace engram
