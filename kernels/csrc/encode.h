// Row codecs in C++, the other way: float32 rows to bytes, and what the bytes lost. The numbers are those of the NumPy
// encoders in kernels/codecs.py, bit for bit: the same fp32 operations in the same order, no fused multiply-add.
#pragma once
#include <cstdint>

#include "rows.h"

namespace engram {

// Encode n rows of `width` values that lie `pitch` floats apart into n * `bytes` bytes. False where a value is NaN or
// infinite, or a scale does not fit its type: what was written is then of no use. One thread.
using EncodeRows = bool (*)(int64_t bytes, int64_t width, const float* rows, int64_t pitch, int64_t n, uint8_t* out);

// Sums over each of n rows, in fp64: (back - row)^2 (the difference in fp32) and row^2. Value d goes to the partial sum
// d mod 16; the partial sums are added in pairs (i, i + 8), (i, i + 4), (i, i + 2), (i, i + 1).
using SumErrors = void (*)(int64_t width, const float* rows, int64_t pitch, const float* back, int64_t n, double* lost,
                           double* whole);

struct EncodeTable {
    EncodeRows encode[CODEC_COUNT];  // null where there is no encoder in C++
    SumErrors errors;
};

}  // namespace engram
