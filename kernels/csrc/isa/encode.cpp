// Row encoders, compiled once per instruction set: plain loops over groups of 32 that the compiler turns into vectors.
// Every operation is exact or one correctly rounded fp32 operation, as in kernels/codecs.py.
#include <cstring>

#include "../encode.h"
#include "../encode_parts.h"
#include "../isa_tables.h"
#include "../simd.h"

namespace engram::ENGRAM_ISA {
namespace {

constexpr int GROUP = 32;
// The nearest entry of a book: how many middles between its entries lie below x. The middles are rounded down to fp32:
// x is above the exact middle where it is above that.
using I = int32_t __attribute__((vector_size(4 * W)));
inline void count_below(const float* middles, const float* q, int32_t* codes) {
    for (int i = 0; i < GROUP; i += W) {
        V x;
        memcpy(&x, q + i, sizeof x);
        I code = {};
        for (int j = 0; j < 15; ++j) code -= I(x > set1(middles[j]));  // true is -1
        memcpy(codes + i, &code, sizeof code);
    }
}

// 32 codes to 16 bytes; of a group of n: n / 2.
inline void put_nibbles(const int32_t* codes, int64_t n, uint8_t* out) {
    if (n == GROUP)
        for (int i = 0; i < GROUP / 2; ++i) out[i] = uint8_t(codes[i] | codes[i + GROUP / 2] << 4);
    else
        for (int64_t i = 0; i < n / 2; ++i) out[i] = uint8_t(codes[i] | codes[i + n / 2] << 4);
}

// The unshrunk scale (kernels/codec_base.py) of a group filled up to 32, as fp16; what is stored already stays where that
// is zero or does not fit. `steps`: the entries of the book that were chosen.
inline void put_unshrunk(const float* x, const float* steps, uint8_t* stored) {
    const double along = ordered_sum(x, steps, GROUP);
    if (along == 0.0) return;
    uint8_t half[2];
    if (put_half(float(ordered_sum(x, x, GROUP) / along), half) && (half[0] | (half[1] & 0x7F)) != 0)
        memcpy(stored, half, 2);
}
template <int j> inline void put_parts(const Book& book, B16 index, float* out) {
    if constexpr (j * W < 16) {
        const V part = book_part<j>(book, index);
        memcpy(out + j * W, &part, sizeof part);
        put_parts<j + 1>(book, index, out);
    }
}
// The entries of 32 codes that put_nibbles packed, or of the codes themselves where there are fewer.
inline void chosen_steps(const float* entries, const uint8_t* packed, const int32_t* codes, int64_t n, float* out) {
    if (n == GROUP) {
        const Book book = load_book(entries);
        const B16 both = load16(packed);
        put_parts<0>(book, low_nibbles(both), out);
        put_parts<0>(book, high_nibbles(both), out + 16);
        return;
    }
    for (int i = 0; i < GROUP; ++i) out[i] = entries[codes[i]];
}

// f(values, first, n) for each group; the last one is filled up with zeros.
template <class F> inline bool each_group(const float* x, int64_t D, F f) {
    bool good = true;
    int64_t g = 0;
    for (; g + GROUP <= D; g += GROUP) good &= f(x + g, g, int64_t(GROUP));
    if (g < D) {
        float last[GROUP] = {};
        memcpy(last, x + g, size_t(D - g) * 4);
        good &= f(last, g, D - g);
    }
    return good;
}

// The bits of the largest |x| of 8 groups: four lanes of each, then four groups at a time across.
using Four = int32_t __attribute__((vector_size(16)));
using Eights = int32_t __attribute__((vector_size(32)));
template <class T> inline T larger(T a, T b) { return a > b ? a : b; }
inline Four four_largest(const float* x) {
#if defined(__AVX512F__)
    const __m512i size = _mm512_set1_epi32(int32_t(MAGNITUDE));
    const __m512i first = _mm512_and_si512(_mm512_loadu_si512(x), size);
    const __m512i both = _mm512_max_epi32(first, _mm512_and_si512(_mm512_loadu_si512(x + 16), size));
    const Eights eight = larger(Eights(_mm512_castsi512_si256(both)), Eights(_mm512_extracti64x4_epi64(both, 1)));
    return larger(Four(_mm256_castsi256_si128(__m256i(eight))), Four(_mm256_extracti128_si256(__m256i(eight), 1)));
#else
    constexpr int LANES_OF = W < 8 ? 4 : 8;
    using Lanes = int32_t __attribute__((vector_size(4 * LANES_OF)));
    Lanes found = {};
    for (int i = 0; i < GROUP; i += LANES_OF) {
        Lanes bits;
        memcpy(&bits, x + i, sizeof bits);
        found = larger(found, bits & int32_t(MAGNITUDE));
    }
    Four part[LANES_OF / 4];
    memcpy(part, &found, sizeof found);
    return LANES_OF == 4 ? part[0] : larger(part[0], part[LANES_OF / 4 - 1]);
#endif
}
inline Four across(const float* const* at) {
    const Four a = four_largest(at[0]), b = four_largest(at[1]), c = four_largest(at[2]), d = four_largest(at[3]);
    const Four ab = larger(Four{a[0], b[0], a[1], b[1]}, Four{a[2], b[2], a[3], b[3]});
    const Four cd = larger(Four{c[0], d[0], c[1], d[1]}, Four{c[2], d[2], c[3], d[3]});
    return larger(Four{ab[0], ab[1], cd[0], cd[1]}, Four{ab[2], ab[3], cd[2], cd[3]});
}

// 16 groups of one or more rows together: scales wait for no one's steps, and a vector division serves 8 of them.
constexpr int TOGETHER = 16;
using Floats = float __attribute__((vector_size(32)));

struct Int8Scales {
    const float* at[TOGETHER];
    float inverse[TOGETHER];
    uint8_t half[2 * TOGETHER];

    // max|x| / 127 of each group, as fp16, and the reciprocal of its fp32 value.
    bool find(int count) {
        for (int k = count; k % 8; ++k) at[k] = at[count - 1];
        Eights wrong = {};
        bool fits = true;
        for (int k = 0; k < count; k += 8) {
            const Four low = across(at + k), high = across(at + k + 4);
            const Eights most = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
            const Floats scale = Floats(most) / 127.0f;
            const Eights bits = Eights(1.0f / scale);
            const Eights finite = bits & ((bits & int32_t(MAGNITUDE)) < int32_t(INFINITE));
            wrong |= most >= int32_t(INFINITE);
            memcpy(inverse + k, &finite, sizeof finite);
            fits &= put_halves(scale, half + 2 * k);
        }
        int32_t any = 0;
        for (int k = 0; k < 8; ++k) any |= wrong[k];
        return fits & !any;
    }
    static bool put_halves(Floats scale, uint8_t* out) {
#if defined(__F16C__)
        const __m128i halves = _mm256_cvtps_ph(__m256(scale), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i*)out, halves);
        const __m128i top = _mm_set1_epi16(0x7C00);
        return !_mm_movemask_epi8(_mm_cmpeq_epi16(_mm_and_si128(halves, top), top));
#else
        bool good = true;
        for (int k = 0; k < 8; ++k) good &= put_half(scale[k], out + 2 * k);
        return good;
#endif
    }
};

// The steps x * (1 / scale), rounded half away from zero.
// To add the largest number below one half, with the value's sign, and to cut rounds half away from zero.
inline void int8_steps(const float* x, float inverse, uint8_t* out) {
#if defined(__AVX512F__)
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512i sign = _mm512_set1_epi32(int32_t(SIGN)), half = _mm512_set1_epi32(0x3EFFFFFF);
    for (int i = 0; i < GROUP; i += 16) {
        const __m512 q = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
        const __m512i signed_half = _mm512_ternarylogic_epi32(_mm512_castps_si512(q), sign, half, 0xEA);  // q & sign | half
        const __m512i steps = _mm512_cvttps_epi32(_mm512_add_ps(q, _mm512_castsi512_ps(signed_half)));
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(steps));
    }
    return;
#elif defined(__AVX2__)
    const __m256 factor = _mm256_set1_ps(inverse), sign = _mm256_set1_ps(-0.0f);
    const __m256 half = _mm256_set1_ps(bits_to_float(0x3EFFFFFFu));
    __m256i steps[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 q = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor);
        steps[i] = _mm256_cvttps_epi32(_mm256_add_ps(q, _mm256_or_ps(_mm256_and_ps(q, sign), half)));
    }
    const __m256i low = _mm256_packs_epi32(steps[0], steps[1]), high = _mm256_packs_epi32(steps[2], steps[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing interleaves the halves
    _mm256_storeu_si256((__m256i*)out, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
    return;
#endif
    for (int i = 0; i < GROUP; ++i) {
        const float q = x[i] * inverse;
        out[i] = uint8_t(int32_t(q + bits_to_float(0x3EFFFFFFu | (float_to_bits(q) & SIGN))));
    }
}

// The value of largest magnitude, the first of equals; `most` takes its bits without the sign.
inline float largest_value(const float* x, uint32_t& most) {
    int32_t above = 0, below = 0;
    for (int i = 0; i < GROUP; ++i) {
        const int32_t bits = int32_t(bits_at(x + i)), size = bits & int32_t(MAGNITUDE), negative = bits >> 31;
        const int32_t up = size & ~negative, down = size & negative;
        above = up > above ? up : above;
        below = down > below ? down : below;
    }
    most = uint32_t(above > below ? above : below);
    if (above != below) return bits_to_float(above > below ? most : most | SIGN);
    int i = 0;
    while ((bits_at(x + i) & MAGNITUDE) != most) ++i;
    return x[i];
}

struct Float32 {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        memcpy(out, x, size_t(D) * 4);
        return largest_bits(x, D) < INFINITE;
    }
};
struct BFloat16 {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        for (int64_t i = 0; i < D; ++i) {
            const uint32_t bits = bits_at(x + i), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
            const uint32_t most = (bits >> 16 & 0x8000u) | 0x7F7Fu;
            const uint16_t half = uint16_t((rounded & 0x7FFFu) == 0x7F80u ? most : rounded);
            memcpy(out + 2 * i, &half, 2);
        }
        return largest_bits(x, D) < INFINITE;
    }
};
struct Int8Row {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        const uint32_t most = largest_bits(x, D);
        float scale = bits_to_float(most) / 127.0f;
        if ((float_to_bits(scale * 127.0f) & MAGNITUDE) >= INFINITE) scale = bits_to_float(float_to_bits(scale) - 1);
        memcpy(out + D, &scale, 4);
        if (scale == 0.0f || most >= INFINITE) {
            memset(out, 0, size_t(D));
            return most < INFINITE;
        }
        for (int64_t i = 0; i < D; ++i) {
            // 1.5 * 2^23: what is added to it is rounded to whole numbers, half to even. Only where the scale is
            // subnormal can |x| / scale pass 127, up to 190.
            int32_t step = int32_t(float_to_bits(x[i] / scale + 12582912.0f) - 0x4B400000u);
            step = step < -127 ? -127 : step;
            out[i] = uint8_t(step > 127 ? 127 : step);
        }
        return true;
    }
};
// Where a group's steps and its scale lie in a row.
struct Int8 {
    static constexpr int64_t steps_at(int64_t g) { return g * GROUP; }
    static constexpr int64_t scale_at(int64_t g, int64_t D) { return D + 2 * g; }
};
struct GgufQ8 {
    static constexpr int64_t steps_at(int64_t g) { return g * 34 + 2; }
    static constexpr int64_t scale_at(int64_t g, int64_t) { return g * 34; }
};
template <class C>
bool encode_int8(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    const int64_t groups = (D + GROUP - 1) / GROUP, end = n * groups, rest = D % GROUP;
    Int8Scales scales;
    float last[TOGETHER][GROUP];  // a row's last group, filled up with zeros
    bool good = true;
    int64_t row = 0, g = 0, done_row = 0, done_g = 0;
    for (int64_t done = 0; done < end;) {
        const int count = int(end - done < TOGETHER ? end - done : TOGETHER);
        for (int k = 0; k < count; ++k) {
            const float* x = rows + row * pitch + g * GROUP;
            if (++g == groups) {
                if (rest) {
                    memset(last[k], 0, sizeof last[k]);
                    x = (const float*)memcpy(last[k], x, size_t(rest) * 4);
                }
                g = 0, ++row;
            }
            scales.at[k] = x;
        }
        good &= scales.find(count);
        for (int k = 0; k < count; ++k) {
            uint8_t *to = out + done_row * bytes, *steps = to + C::steps_at(done_g);
            memcpy(to + C::scale_at(done_g, D), scales.half + 2 * k, 2);
            if (++done_g == groups) {
                done_g = 0, ++done_row;
                if (rest) {
                    uint8_t all[GROUP];
                    int8_steps(scales.at[k], scales.inverse[k], all);
                    memcpy(steps, all, size_t(rest));
                    continue;
                }
            }
            int8_steps(scales.at[k], scales.inverse[k], steps);
        }
        done += count;
    }
    return good;
}

// Middles of the NF4 book's neighbours in exact arithmetic, rounded down to fp32; tests/test_encode.py works them out.
constexpr float NF4_MIDDLES[15] = {
    -0.84809643f, -0.610632956f, -0.45999527f, -0.33967945f, -0.234607413f,
    -0.137911737f, -0.0455250181f, 0.0397901498f, 0.120255247f, 0.203521252f,
    0.292013764f, 0.389312536f, 0.501663387f, 0.64278692f, 0.861478388f};
constexpr float IQ4_MIDDLES[15] = {-115.5f, -93.5f, -74.0f, -57.0f, -42.0f, -28.5f, -16.0f, -4.5f,
                                   7.0f,    19.0f,  31.5f,  45.5f,  61.0f,  79.0f,  101.0f};

alignas(64) constexpr float NF4_STEPS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
alignas(64) constexpr float IQ4_STEPS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Nf4 {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        return each_group(x, D, [&](const float* v, int64_t g, int64_t n) {
            const uint32_t most = largest_bits(v, GROUP);
            uint8_t* stored = out + D / 2 + g / GROUP * 2;
            if (!(put_half(bits_to_float(most), stored) & (most < INFINITE))) return false;
            const float scale = half_scale(stored);
            const float divisor = scale != 0.0f ? scale : bits_to_float(INFINITE);  // x / infinity is zero
            float q[GROUP];
            for (int i = 0; i < GROUP; ++i) q[i] = v[i] / divisor;
            int32_t codes[GROUP];
            count_below(NF4_MIDDLES, q, codes);
            put_nibbles(codes, n, out + g / 2);
            float steps[GROUP];
            chosen_steps(NF4_STEPS, out + g / 2, codes, n, steps);
            put_unshrunk(v, steps, stored);
            return true;
        });
    }
};
struct GgufQ4 {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        return each_group(x, D, [&](const float* v, int64_t g, int64_t) {
            uint32_t most;
            const float scale = largest_value(v, most) / -8.0f, inverse = finite_reciprocal(scale);
            uint8_t* block = out + g / GROUP * 18;
            int32_t codes[GROUP];
            for (int i = 0; i < GROUP; ++i) {
                const int32_t code = int32_t(v[i] * inverse + 8.5f);
                codes[i] = code < 15 ? code : 15;
            }
            put_nibbles(codes, GROUP, block + 2);
            return put_half(scale, block) & (most < INFINITE);
        });
    }
};
struct GgufIq4 {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        return each_group(x, D, [&](const float* v, int64_t g, int64_t) {
            uint32_t most;
            const float scale = largest_value(v, most) / -127.0f, inverse = finite_reciprocal(scale);
            uint8_t* block = out + g / GROUP * 18;
            float q[GROUP];
            for (int i = 0; i < GROUP; ++i) q[i] = v[i] * inverse;
            int32_t codes[GROUP];
            count_below(IQ4_MIDDLES, q, codes);
            put_nibbles(codes, GROUP, block + 2);
            if (!(put_half(scale, block) & (most < INFINITE))) return false;
            float steps[GROUP];
            chosen_steps(IQ4_STEPS, block + 2, codes, GROUP, steps);
            put_unshrunk(v, steps, block);
            return true;
        });
    }
};

// v, held within the bound (at most 448, given as bits), to e4m3fn, ties to even: a normal number by cutting its
// fraction to 3 bits, below 2^-6 in steps of 2^-9.
inline uint8_t e4m3_code(float v, int32_t bound) {
    const uint32_t bits = float_to_bits(v);
    const int32_t whole = int32_t(bits & MAGNITUDE);
    const uint32_t size = uint32_t(whole < bound ? whole : bound);
    const uint32_t normal = ((size + 0x7FFFFu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
    const uint32_t tiny = float_to_bits(bits_to_float(size) + 16384.0f) - 0x46800000u;
    return uint8_t((size < 0x3C800000u ? tiny : normal) | (bits >> 24 & 0x80u));
}
struct Fp8E8m0 {
    static bool row(const float* x, int64_t D, uint8_t* out) {
        return each_group(x, D, [&](const float* v, int64_t g, int64_t n) {
            const uint32_t most = largest_bits(v, GROUP);
            // The smallest power with most / 2^power <= 448 = 1.75 * 2^8; subnormal numbers are far below 448 * 2^-127.
            const int32_t exponent = int32_t(most >> 23) - 127;
            int32_t power = exponent - 8 + ((most & 0x7FFFFFu) > 0x600000u ? 1 : 0);
            if (power < -127) power = -127;
            const float inverse = bits_to_float(uint32_t(127 - power) << 23);
            const int32_t bound = power == 120 ? 0x43700000 : 0x43E00000;  // 240 (256 * 2^120 is infinite) or 448
            uint8_t codes[GROUP];  // the product is exact, or so small that the code is zero
            for (int i = 0; i < GROUP; ++i) codes[i] = e4m3_code(v[i] * inverse, bound);
            memcpy(out + g, codes, n == GROUP ? GROUP : size_t(n));
            out[D + g / GROUP] = uint8_t(power + 127);
            return most < INFINITE;
        });
    }
};

template <class C>
bool encoder(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    bool good = true;
    for (int64_t r = 0; r < n; ++r) good &= C::row(rows + r * pitch, D, out + r * bytes);
    return good;
}

constexpr int LANES = 16, HALF = W / 2, PARTS = LANES / HALF;
using Few = float __attribute__((vector_size(4 * HALF)));
using Doubles = double __attribute__((vector_size(8 * HALF)));

struct Sums {
    Doubles lost[PARTS] = {}, whole[PARTS] = {};

    void add(const float* x, const float* y) {
        for (int p = 0; p < PARTS; ++p) {
            Few value, back;
            memcpy(&value, x + p * HALF, sizeof value);
            memcpy(&back, y + p * HALF, sizeof back);
            const Doubles wide = __builtin_convertvector(value, Doubles);
            const Doubles difference = __builtin_convertvector(back - value, Doubles);
            lost[p] += difference * difference;
            whole[p] += wide * wide;
        }
    }
    static double folded(const Doubles* parts) {
        double sums[LANES];
        memcpy(sums, parts, sizeof sums);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        return sums[0];
    }
};
void sum_errors(int64_t D, const float* rows, int64_t pitch, const float* back, int64_t n, double* lost, double* whole) {
    for (int64_t r = 0; r < n; ++r) {
        const float *x = rows + r * pitch, *y = back + r * D;
        Sums sums;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) sums.add(x + d, y + d);
        if (d < D) {
            float last[2][LANES] = {};
            memcpy(last[0], x + d, size_t(D - d) * 4);
            memcpy(last[1], y + d, size_t(D - d) * 4);
            sums.add(last[0], last[1]);
        }
        lost[r] = Sums::folded(sums.lost), whole[r] = Sums::folded(sums.whole);
    }
}

}  // namespace

bool encode_h4(int64_t, int64_t, const float*, int64_t, int64_t, uint8_t*);  // encode_hadamard.cpp
bool encode_h3(int64_t, int64_t, const float*, int64_t, int64_t, uint8_t*);
bool encode_h2(int64_t, int64_t, const float*, int64_t, int64_t, uint8_t*);
bool encode_h1(int64_t, int64_t, const float*, int64_t, int64_t, uint8_t*);

extern const EncodeTable encode_table;
const EncodeTable encode_table = {
    {encoder<Float32>, encoder<BFloat16>, encoder<Int8Row>, encode_int8<Int8>, encoder<Nf4>, encoder<Fp8E8m0>,
     encode_int8<GgufQ8>, encoder<GgufQ4>, encoder<GgufIq4>, encode_h4, encode_h3, encode_h2, nullptr,
     nullptr, nullptr, encode_h1},
    sum_errors};

}  // namespace engram::ENGRAM_ISA
