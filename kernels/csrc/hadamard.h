// The rotation of h4 to h1 (kernels/hadamard_codecs.py), once per instruction set. Included by csrc/isa/rows.cpp only.
//
// Books hold whole numbers up to 104, so sums of up to 256 of them fit 16 bits and larger ones are whole fp32 numbers:
// nothing is rounded, the order of additions is free, and 16-bit lanes do twice the work of fp32.
#pragma once
#include <utility>

#include "rows.h"
#include "simd.h"

namespace engram {

// Bit 31 of MurmurHash3's finalizer of j + 1: the sign bit of column j.
struct Signs { uint32_t of[WIDEST_ROTATED]; };
constexpr Signs column_signs() {
    Signs signs{};
    for (uint32_t j = 0; j < WIDEST_ROTATED; ++j) {
        uint32_t h = j + 1;
        h = (h ^ h >> 16) * 0x85EBCA6Bu;
        h = (h ^ h >> 13) * 0xC2B2AE35u;
        signs.of[j] = (h ^ h >> 16) & 0x80000000u;
    }
    return signs;
}
alignas(64) inline constexpr Signs SIGNS = column_signs();

}  // namespace engram

namespace engram::ENGRAM_ISA {

constexpr int LANES = 2 * W;  // 16-bit numbers in a vector; unsigned, as sums modulo 2^16 are the same bits
typedef uint16_t Lanes __attribute__((vector_size(4 * W)));

template <int... I> inline Lanes shuffled(Lanes a, Lanes b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, Lanes{uint16_t(I)...});
#endif
}
// Lanes at distance h: a and b become a + b and a - b.
template <int h, int... I> inline Lanes lane_stage(Lanes v, std::integer_sequence<int, I...>) {
    const Lanes other = shuffled<(I ^ h)...>(v, v);
    return shuffled<(I & h ? I + LANES : I)...>(other + v, other - v);
}
template <int h, int B> inline Lanes lane_stages(Lanes v) {
    if constexpr (h < B && h < LANES)
        return lane_stages<2 * h, B>(lane_stage<h>(v, std::make_integer_sequence<int, LANES>()));
    else return v;
}
template <int COUNT, int d> inline void register_stages(Lanes* v) {
    if constexpr (d < COUNT) {
        for (int i = 0; i < COUNT; ++i)
            if (!(i & d)) {
                const Lanes a = v[i], b = v[i + d];
                v[i] = a + b;
                v[i + d] = a - b;
            }
        register_stages<COUNT, 2 * d>(v);
    }
}

// Blocks of B <= 256 numbers; t is aligned, and may be written up to the next multiple of LANES behind n.
template <int B> void rotate16(int16_t* t, int64_t n) {
    constexpr int COUNT = B <= LANES ? 1 : B / LANES < 8 ? B / LANES : 8, STEP = COUNT * LANES;
    for (int64_t i = 0; i < n; i += STEP) {
        Lanes v[COUNT];
        memcpy(v, t + i, sizeof v);
        for (Lanes& one : v) one = lane_stages<1, B>(one);
        register_stages<COUNT, 1>(v);
        memcpy(t + i, v, sizeof v);
    }
    for (int64_t h = STEP; h < B; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h)
            for (int64_t k = i; k < i + h; k += LANES) {
                Lanes a, b;
                memcpy(&a, t + k, sizeof a);
                memcpy(&b, t + k + h, sizeof b);
                const Lanes sum = a + b, difference = a - b;
                memcpy(t + k, &sum, sizeof sum);
                memcpy(t + k + h, &difference, sizeof difference);
            }
}
inline void rotate16(int16_t* t, int64_t n, int64_t block) {
    switch (block) {
        case 1: return;
        case 2: return rotate16<2>(t, n);
        case 4: return rotate16<4>(t, n);
        case 8: return rotate16<8>(t, n);
        case 16: return rotate16<16>(t, n);
        case 32: return rotate16<32>(t, n);
        case 64: return rotate16<64>(t, n);
        case 128: return rotate16<128>(t, n);
        default: return rotate16<256>(t, n);
    }
}
// The stages from h = 256 on, in fp32.
inline void rotate32(float* t, int64_t n, int64_t block) {
    for (int64_t h = 256; h < block; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h)
            for (int64_t k = i; k < i + h; ++k) {
                const float a = t[k], b = t[k + h];
                t[k] = a + b;
                t[k + h] = a - b;
            }
}

// fp32 numbers to values: t * (sign * f), one product each.
template <class T> inline void rotated_values(const int16_t* t, int64_t n, float f, T* o) {
    const uint32_t* signs = SIGNS.of;
    const V scale = set1(f);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(o + i, mul(whole(t + i), signed_by(scale, signs + i)));
    for (; i < n; ++i) put(o + i, float(t[i]) * bits_to_float(float_to_bits(f) ^ signs[i]));
}
template <class T> inline void rotated_values(const float* t, int64_t n, float f, T* o) {
    for (int64_t i = 0; i < n; ++i) put(o + i, t[i] * bits_to_float(float_to_bits(f) ^ SIGNS.of[i]));
}

// Planes of codes to steps of the book. A plane's parts lie one behind another in t; what is written behind a part's end
// is overwritten by the next one.
struct FourBits {
    static constexpr int BITS = 4;
    static constexpr int RMS = 38;
    static constexpr int8_t BOOK[16] = {-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104};
    static void steps(const uint8_t* p, int64_t D, const B16& book, int16_t* t) {
        const int64_t half = D / 2;
        for (int64_t i = 0; i < half; i += 16) store_steps(t + i, look_up(book, low_nibbles(load16(p + i))));
        for (int64_t i = 0; i < half; i += 16) store_steps(t + half + i, look_up(book, high_nibbles(load16(p + i))));
    }
};
// A code that is one plane, from part k on.
template <int bits, int k = 0> inline void plane_steps(const uint8_t* p, int64_t D, const B16& book, int16_t* t) {
    const int64_t each = D * bits / 8;
    for (int64_t i = 0; i < each; i += 16)
        store_steps(t + k * each + i, look_up(book, bits_of<k * bits, (1 << bits) - 1>(load16(p + i))));
    if constexpr ((k + 1) * bits < 8) plane_steps<bits, k + 1>(p, D, book, t);
}
struct TwoBits {
    static constexpr int BITS = 2;
    static constexpr int RMS = 53;
    static constexpr int8_t BOOK[16] = {-80, -24, 24, 80};
    static void steps(const uint8_t* p, int64_t D, const B16& book, int16_t* t) { plane_steps<2>(p, D, book, t); }
};
struct OneBit {
    static constexpr int BITS = 1;
    static constexpr int RMS = 1;
    static constexpr int8_t BOOK[16] = {-1, 1};
    static void steps(const uint8_t* p, int64_t D, const B16& book, int16_t* t) { plane_steps<1>(p, D, book, t); }
};
struct ThreeBits {
    static constexpr int BITS = 3;
    static constexpr int RMS = 41;
    static constexpr int8_t BOOK[16] = {-88, -55, -31, -10, 10, 31, 55, 88};
    template <int k> static void part(const uint8_t* p, int64_t each, const B16& book, int16_t* t) {
        const uint8_t *pair = p + k % 2 * each, *single = p + 2 * each;
        for (int64_t i = 0; i < each; i += 16) {
            const B16 low = bits_of<k / 2 * 2, 3>(load16(pair + i)), high = bits_of<k, 1>(load16(single + i));
            store_steps(t + k * each + i, look_up(book, with_high<2>(low, high)));
        }
    }
    static void steps(const uint8_t* p, int64_t D, const B16& book, int16_t* t) {
        const int64_t each = D / 8;
        part<0>(p, each, book, t);
        part<1>(p, each, book, t);
        part<2>(p, each, book, t);
        part<3>(p, each, book, t);
        part<4>(p, each, book, t);
        part<5>(p, each, book, t);
        part<6>(p, each, book, t);
        part<7>(p, each, book, t);
    }
};

// Reads up to 15 bytes behind a row.
template <class H> struct Hadamard {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        const int64_t block = D & -D;
        const float scale = half_scale(p + D * H::BITS / 8);
        const float f = scale * float(1 / (H::RMS * __builtin_sqrt(double(block))));
        if (f != f) {  // damaged
            for (int64_t i = 0; i < D; ++i) put(o + i, f);
            return;
        }
        alignas(64) int16_t t[WIDEST_ROTATED + 64];
        H::steps(p, D, load16((const uint8_t*)H::BOOK), t);
        rotate16(t, D, block);
        if (block <= 256) return rotated_values(t, D, f, o);
        alignas(64) float wide[WIDEST_ROTATED];
        for (int64_t i = 0; i < D; ++i) wide[i] = t[i];
        rotate32(wide, D, block);
        rotated_values(wide, D, f, o);
    }
};

}  // namespace engram::ENGRAM_ISA
