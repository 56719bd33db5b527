// What the row encoders share: largest magnitudes, fp16 scales, sums in the stated order. Included by csrc/isa only.
#pragma once
#include <cstring>

#include "simd.h"

namespace engram::ENGRAM_ISA {

constexpr uint32_t SIGN = 0x80000000u, MAGNITUDE = 0x7FFFFFFFu, INFINITE = 0x7F800000u;

inline uint32_t bits_at(const float* x) { uint32_t b; memcpy(&b, x, 4); return b; }
inline float size_of(float x) { return bits_to_float(float_to_bits(x) & MAGNITUDE); }

// Bits of the largest |x| of n; INFINITE or more where a value is not finite.
inline uint32_t largest_bits(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t size = int32_t(bits_at(x + i) & MAGNITUDE);
        most = size > most ? size : most;
    }
    return uint32_t(most);
}

// To nearest, ties to even; false for what becomes infinite (and nothing else: NaN is refused before).
inline bool put_half(float x, uint8_t* out) {
#if defined(__F16C__)
    const uint16_t half = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = float_to_bits(x), size = bits & MAGNITUDE;
    uint32_t rounded;
    if (size >= 0x477FF000u) rounded = 0x7C00u;                      // 65520 and more
    else if (size < 0x38800000u)                                     // below 2^-14: steps of 2^-24
        rounded = float_to_bits(bits_to_float(size) + 0.5f) - 0x3F000000u;
    else rounded = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    const uint16_t half = uint16_t(rounded | (bits >> 16 & 0x8000u));
#endif
    memcpy(out, &half, 2);
    return (half & 0x7C00u) != 0x7C00u;
}

inline float finite_reciprocal(float scale) {
    const float inverse = 1.0f / scale;
    return (float_to_bits(inverse) & MAGNITUDE) < INFINITE ? inverse : 0.0f;
}

// ordered_sums of kernels/codec_base.py: fp64, eight partial sums by column modulo 8, added in pairs. Both arrays are zero
// from D to the next multiple of 8.
using Eight = double __attribute__((vector_size(64)));
using EightSingles = float __attribute__((vector_size(32)));
inline double ordered_sum(const float* a, const float* b, int64_t D) {
    Eight p = {};
    for (int64_t i = 0; i < D; i += 8) {
        EightSingles left, right;
        memcpy(&left, a + i, sizeof left);
        memcpy(&right, b + i, sizeof right);
        p += __builtin_convertvector(left, Eight) * __builtin_convertvector(right, Eight);
    }
    return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

}  // namespace engram::ENGRAM_ISA
