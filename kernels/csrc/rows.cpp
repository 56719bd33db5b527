// Row sizes, and the active instruction set's decoders behind the names of rows.h.
#include "rows.h"

#include "isa_tables.h"

namespace engram {

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
        case H4: return width % 2 || width > WIDEST_ROTATED ? -1 : width / 2 + 2;
        case H3: return width % 8 || width > WIDEST_ROTATED ? -1 : width / 8 * 3 + 2;
        case H2: return width % 4 || width > WIDEST_ROTATED ? -1 : width / 4 + 2;
        case FP8_ROW: return width + 4;
        case FP8_TENSOR: return width;
        case NVFP4: return width % 16 ? -1 : width / 16 * 9;
        case H1: return width % 8 || width > WIDEST_ROTATED ? -1 : width / 8 + 2;
        default: return -1;
    }
}

void decode_rows(RowCodec codec, int64_t width, const uint8_t* const* rows, int64_t n, int64_t known, void* out,
                 bool bf16) {
    active_table().rows->decode[codec.code](row_bytes(codec.code, width), width, rows, n, known, codec.factor, out,
                                              bf16);
}

void copy_rows(int64_t bytes, const uint8_t* const* rows, int64_t n, int64_t known, uint8_t* out) {
    active_table().rows->copy(bytes, rows, n, known, out);
}

}  // namespace engram
