// Row codecs in C++: decode rows that lie at given addresses. The layouts are those of kernels/codecs.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace engram {

// The numbers are Codec.code in kernels/codecs.py.
enum Codec : int { F32 = 0, BF16, INT8_ROW, INT8, NF4, FP8_E8M0, Q8_0, Q4_0, IQ4_NL, H4, H3, H2, FP8_ROW,
                   FP8_TENSOR, NVFP4, H1, CODEC_COUNT };

// How rows are encoded: the codec, and the table-wide factor of those that have one (1 otherwise).
struct RowCodec {
    int code = -1;
    float factor = 1;
};

constexpr int64_t WIDEST_ROTATED = 4096;  // columns of h4 to h1: their decoders have room for no more

// Bytes of one row, or -1 for a width that the codec cannot hold.
int64_t row_bytes(int codec, int64_t width);

// Decode n rows; row i lies at rows[i]. `out` takes n * width values, fp32 or (rounded to nearest even) bf16.
// `known` >= n addresses are valid: the rows behind the n-th are prefetched for the next call. One thread.
void decode_rows(RowCodec codec, int64_t width, const uint8_t* const* rows, int64_t n, int64_t known, void* out,
                 bool bf16);
inline void decode_rows(RowCodec codec, int64_t width, const uint8_t* const* rows, int64_t n, void* out, bool bf16) {
    decode_rows(codec, width, rows, n, n, out, bf16);
}

// Copy the bytes of n rows as they are, one behind another.
void copy_rows(int64_t bytes, const uint8_t* const* rows, int64_t n, int64_t known, uint8_t* out);
inline void copy_rows(int64_t bytes, const uint8_t* const* rows, int64_t n, uint8_t* out) {
    copy_rows(bytes, rows, n, n, out);
}

// CRC-32 as zlib computes it (polynomial 0xEDB88320, start and end inverted).
uint32_t crc32(const uint8_t* bytes, size_t count);
uint32_t crc32_tables(const uint8_t* bytes, size_t count);  // the portable way, for tests

}  // namespace engram
