// The chosen instruction set's decoders behind the names of rows.h.
#include "rows.h"

#include "isa.h"
#include "isa_tables.h"

namespace engram {

namespace baseline { extern const RowTable row_table; }
#if defined(ENGRAM_X86)
namespace avx2 { extern const RowTable row_table; }
namespace avx512 { extern const RowTable row_table; }
#elif defined(ENGRAM_ARM)
namespace neon { extern const RowTable row_table; }
#endif

static const RowTable& table() {
    switch (active_isa()) {
#if defined(ENGRAM_X86)
        case Isa::avx512: return avx512::row_table;
        case Isa::avx2: return avx2::row_table;
#elif defined(ENGRAM_ARM)
        case Isa::neon: return neon::row_table;
#endif
        default: return baseline::row_table;
    }
}

int64_t row_bytes(int codec, int64_t width) {
    if (width < 1) return -1;
    const int64_t groups = (width + 31) / 32;
    switch (codec) {
        case F32: return 4 * width;
        case BF16: return 2 * width;
        case INT8_ROW: return width + 4;
        case INT8: return width + 2 * groups;
        case NF4: return width % 2 ? -1 : width / 2 + 2 * groups;
        case FP8_E8M0: return width + groups;
        case Q8_0: return width % 32 ? -1 : groups * 34;
        case Q4_0:
        case IQ4_NL: return width % 32 ? -1 : groups * 18;
        default: return -1;
    }
}

void decode_rows(int codec, int64_t width, const uint8_t* const* rows, int64_t n, int64_t known, void* out, bool bf16) {
    table().decode[codec](row_bytes(codec, width), width, rows, n, known, out, bf16);
}

void copy_rows(int64_t bytes, const uint8_t* const* rows, int64_t n, int64_t known, uint8_t* out) {
    table().copy(bytes, rows, n, known, out);
}

}  // namespace engram
