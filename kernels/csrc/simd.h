// The few vector operations that the row codecs need, once per instruction set. Included by files in csrc/isa only.
//
// W lanes of fp32. B16 is 16 bytes; `part<j>` of one is its j-th W bytes. Every operation is exact or one correctly
// rounded fp32 operation, so that all instruction sets give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace engram::ENGRAM_ISA {

constexpr uint32_t QUIET_NAN = 0x7FC00000u;

inline float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

// Stores of bf16 round to nearest, ties to even. ANY_NAN keeps the upper bits of every NaN and makes it quiet; without
// it only QUIET_NAN may come, which rounding leaves alone.

// One value, for the ends of rows.
inline uint16_t bf16_of(float f) {
    const uint32_t bits = float_to_bits(f);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t(bits >> 16) | 0x40;
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void put(float* o, float x) { *o = x; }
inline void put(uint16_t* o, float x) { *o = bf16_of(x); }
inline float e4m3_of(uint8_t code) {
    const uint32_t m = code & 0x7Fu, sign = (code & 0x80u) << 24;
    if (m == 0x7Fu) return bits_to_float(QUIET_NAN);
    const float size = m < 8 ? float(m) * (1.0f / 512) : bits_to_float((m << 20) + (120u << 23));
    return bits_to_float(float_to_bits(size) | sign);
}

#if defined(__AVX512F__)
constexpr int W = 16;
using V = __m512;
using B16 = __m128i;
struct Book { V all; };
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V whole(const int16_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}
inline V signed_by(V x, const uint32_t* signs) { return _mm512_xor_ps(x, _mm512_loadu_ps(signs)); }
inline V load_f32(const uint8_t* p) { return _mm512_loadu_ps(p); }
inline V load_bf16(const uint8_t* p) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
template <bool ANY_NAN = false> inline void store(float* o, V v) { _mm512_storeu_ps(o, v); }
template <bool ANY_NAN = false> inline void store(uint16_t* o, V v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    if (ANY_NAN) {
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    }
    _mm256_storeu_si256((__m256i*)o, _mm512_cvtepi32_epi16(r));
}
inline void store_two(uint16_t* o, V a, V b) {
    const __m512i ua = _mm512_castps_si512(a), ub = _mm512_castps_si512(b), one = _mm512_set1_epi32(1);
    const __m512i half = _mm512_set1_epi32(0x7FFF);
    const __m512i ra = _mm512_add_epi32(_mm512_add_epi32(ua, half), _mm512_and_si512(_mm512_srli_epi32(ua, 16), one));
    const __m512i rb = _mm512_add_epi32(_mm512_add_epi32(ub, half), _mm512_and_si512(_mm512_srli_epi32(ub, 16), one));
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                           23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(o, _mm512_permutex2var_epi16(ra, upper, rb));
}
template <int j> inline V signed_part(B16 b) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }
inline Book load_book(const float* entries) { return {_mm512_loadu_ps(entries)}; }
template <int j> inline V book_part(const Book& book, B16 index) {
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), book.all);
}
template <int j> inline V e4m3_part(B16 codes) {
    const __m512i c = _mm512_cvtepu8_epi32(codes), m = _mm512_and_si512(c, _mm512_set1_epi32(0x7F));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(0x80)), 24);
    const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(m, 20), _mm512_set1_epi32(120 << 23));
    const __m512 tiny = _mm512_mul_ps(_mm512_cvtepi32_ps(m), _mm512_set1_ps(1.0f / 512));
    const __mmask16 is_tiny = _mm512_cmplt_epi32_mask(m, _mm512_set1_epi32(8));
    const __m512i size = _mm512_mask_mov_epi32(normal, is_tiny, _mm512_castps_si512(tiny));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(m, _mm512_set1_epi32(0x7F));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_or_si512(size, sign), nan, _mm512_set1_epi32(QUIET_NAN)));
}

#elif defined(__AVX2__)
constexpr int W = 8;
using V = __m256;
using B16 = __m128i;
struct Book { V low, high; };
inline V set1(float x) { return _mm256_set1_ps(x); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V whole(const int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline V signed_by(V x, const uint32_t* signs) { return _mm256_xor_ps(x, _mm256_loadu_ps((const float*)signs)); }
inline V load_f32(const uint8_t* p) { return _mm256_loadu_ps((const float*)p); }
inline V load_bf16(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
template <bool ANY_NAN = false> inline void store(float* o, V v) { _mm256_storeu_ps(o, v); }
template <bool ANY_NAN = false> inline void store(uint16_t* o, V v) {
    const __m256i u = _mm256_castps_si256(v), upper = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = ANY_NAN ? _mm256_blendv_epi8(r, quiet, nan) : r;
    _mm_storeu_si128((__m128i*)o, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
}
template <int j> inline __m128i eighth(B16 b) { return j ? _mm_srli_si128(b, 8) : b; }
template <int j> inline V signed_part(B16 b) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eighth<j>(b))); }
inline Book load_book(const float* entries) { return {_mm256_loadu_ps(entries), _mm256_loadu_ps(entries + 8)}; }
template <int j> inline V book_part(const Book& book, B16 index) {
    const __m256i i = _mm256_cvtepu8_epi32(eighth<j>(index));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 of the index as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(book.low, i), _mm256_permutevar8x32_ps(book.high, i), upper);
}
template <int j> inline V e4m3_part(B16 codes) {
    const __m256i c = _mm256_cvtepu8_epi32(eighth<j>(codes)), m = _mm256_and_si256(c, _mm256_set1_epi32(0x7F));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(0x80)), 24);
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(m, 20), _mm256_set1_epi32(120 << 23));
    const __m256 tiny = _mm256_mul_ps(_mm256_cvtepi32_ps(m), _mm256_set1_ps(1.0f / 512));
    const __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), m);
    const __m256i size = _mm256_blendv_epi8(normal, _mm256_castps_si256(tiny), is_tiny);
    const __m256i nan = _mm256_cmpeq_epi32(m, _mm256_set1_epi32(0x7F));
    return _mm256_castsi256_ps(_mm256_blendv_epi8(_mm256_or_si256(size, sign), _mm256_set1_epi32(QUIET_NAN), nan));
}

#elif defined(__SSE2__)
constexpr int W = 4;
using V = __m128;
using B16 = __m128i;
struct Book { const float* entries; };
inline V set1(float x) { return _mm_set1_ps(x); }
inline V mul(V a, V b) { return _mm_mul_ps(a, b); }
inline V whole(const int16_t* p) {
    const __m128i four = _mm_loadl_epi64((const __m128i*)p);
    return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(four, four), 16));
}
inline V signed_by(V x, const uint32_t* signs) { return _mm_xor_ps(x, _mm_loadu_ps((const float*)signs)); }
inline V load_f32(const uint8_t* p) { return _mm_loadu_ps((const float*)p); }
inline V load_bf16(const uint8_t* p) {
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p)));
}
inline __m128i choose(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}
template <bool ANY_NAN = false> inline void store(float* o, V v) { _mm_storeu_ps(o, v); }
template <bool ANY_NAN = false> inline void store(uint16_t* o, V v) {
    const __m128i u = _mm_castps_si128(v), upper = _mm_srli_epi32(u, 16);
    const __m128i odd = _mm_and_si128(upper, _mm_set1_epi32(1));
    const __m128i r = _mm_srli_epi32(_mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7FFF))), 16);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(v, v));
    const __m128i kept = ANY_NAN ? choose(nan, _mm_or_si128(upper, _mm_set1_epi32(0x40)), r) : r;
    const __m128i narrow = _mm_srai_epi32(_mm_slli_epi32(kept, 16), 16);  // so that signed saturation keeps the bits
    _mm_storel_epi64((__m128i*)o, _mm_packs_epi32(narrow, narrow));
}
template <int j> inline __m128i quarter(B16 b, __m128i upper) {  // W bytes as 32-bit numbers, upper bits from `upper`
    const __m128i pairs = j < 2 ? _mm_unpacklo_epi8(b, upper) : _mm_unpackhi_epi8(b, upper);
    const __m128i sign = _mm_srai_epi16(pairs, 15);
    return j % 2 ? _mm_unpackhi_epi16(pairs, sign) : _mm_unpacklo_epi16(pairs, sign);
}
template <int j> inline V signed_part(B16 b) {
    return _mm_cvtepi32_ps(quarter<j>(b, _mm_cmpgt_epi8(_mm_setzero_si128(), b)));
}
inline Book load_book(const float* entries) { return {entries}; }
template <int j> inline V book_part(const Book& book, B16 index) {
    alignas(16) uint8_t i[16];
    _mm_store_si128((__m128i*)i, index);
    const uint8_t* at = i + 4 * j;
    return _mm_setr_ps(book.entries[at[0]], book.entries[at[1]], book.entries[at[2]], book.entries[at[3]]);
}
template <int j> inline V e4m3_part(B16 codes) {
    const __m128i c = quarter<j>(codes, _mm_setzero_si128()), m = _mm_and_si128(c, _mm_set1_epi32(0x7F));
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(c, _mm_set1_epi32(0x80)), 24);
    const __m128i normal = _mm_add_epi32(_mm_slli_epi32(m, 20), _mm_set1_epi32(120 << 23));
    const __m128 tiny = _mm_mul_ps(_mm_cvtepi32_ps(m), _mm_set1_ps(1.0f / 512));
    const __m128i size = choose(_mm_cmplt_epi32(m, _mm_set1_epi32(8)), _mm_castps_si128(tiny), normal);
    const __m128i nan = _mm_cmpeq_epi32(m, _mm_set1_epi32(0x7F));
    return _mm_castsi128_ps(choose(nan, _mm_set1_epi32(QUIET_NAN), _mm_or_si128(size, sign)));
}

#elif defined(__ARM_NEON)
constexpr int W = 4;
using V = float32x4_t;
using B16 = uint8x16_t;
struct Book { const float* entries; };
inline V set1(float x) { return vdupq_n_f32(x); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V whole(const int16_t* p) { return vcvtq_f32_s32(vmovl_s16(vld1_s16(p))); }
inline V signed_by(V x, const uint32_t* signs) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), vld1q_u32(signs)));
}
inline V load_f32(const uint8_t* p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
inline V load_bf16(const uint8_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16)); }
template <bool ANY_NAN = false> inline void store(float* o, V v) { vst1q_f32(o, v); }
template <bool ANY_NAN = false> inline void store(uint16_t* o, V v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v), upper = vshrq_n_u32(u, 16);
    const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
    const uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
    vst1_u16(o, vmovn_u32(ANY_NAN ? vbslq_u32(vceqq_f32(v, v), r, quiet) : r));
}
template <int j> inline V signed_part(B16 b) {
    const int8x16_t s = vreinterpretq_s8_u8(b);
    const int16x8_t half = vmovl_s8(j < 2 ? vget_low_s8(s) : vget_high_s8(s));
    return vcvtq_f32_s32(vmovl_s16(j % 2 ? vget_high_s16(half) : vget_low_s16(half)));
}
template <int j> inline uint32x4_t unsigned_part(B16 b) {
    const uint16x8_t half = vmovl_u8(j < 2 ? vget_low_u8(b) : vget_high_u8(b));
    return vmovl_u16(j % 2 ? vget_high_u16(half) : vget_low_u16(half));
}
inline Book load_book(const float* entries) { return {entries}; }
template <int j> inline V book_part(const Book& book, B16 index) {
    uint8_t i[16];
    vst1q_u8(i, index);
    const float four[4] = {book.entries[i[4 * j]], book.entries[i[4 * j + 1]], book.entries[i[4 * j + 2]],
                           book.entries[i[4 * j + 3]]};
    return vld1q_f32(four);
}
template <int j> inline V e4m3_part(B16 codes) {
    const uint32x4_t c = unsigned_part<j>(codes), m = vandq_u32(c, vdupq_n_u32(0x7F));
    const uint32x4_t sign = vshlq_n_u32(vandq_u32(c, vdupq_n_u32(0x80)), 24);
    const uint32x4_t normal = vaddq_u32(vshlq_n_u32(m, 20), vdupq_n_u32(120u << 23));
    const uint32x4_t tiny = vreinterpretq_u32_f32(vmulq_f32(vcvtq_f32_u32(m), vdupq_n_f32(1.0f / 512)));
    const uint32x4_t size = vorrq_u32(vbslq_u32(vcltq_u32(m, vdupq_n_u32(8)), tiny, normal), sign);
    return vreinterpretq_f32_u32(vbslq_u32(vceqq_u32(m, vdupq_n_u32(0x7F)), vdupq_n_u32(QUIET_NAN), size));
}
#else
#error "no vector instructions known for this processor: the reference in Python serves it"
#endif

#if defined(__ARM_NEON)
inline B16 load16(const uint8_t* p) { return vld1q_u8(p); }
inline B16 low_nibbles(B16 b) { return vandq_u8(b, vdupq_n_u8(15)); }
inline B16 high_nibbles(B16 b) { return vshrq_n_u8(b, 4); }
inline B16 in_turn_low(B16 a, B16 b) { return vzip1q_u8(a, b); }
inline B16 in_turn_high(B16 a, B16 b) { return vzip2q_u8(a, b); }
template <int shift, int mask> inline B16 bits_of(B16 b) {
    if constexpr (shift) return vandq_u8(vshrq_n_u8(b, shift), vdupq_n_u8(mask));
    else return vandq_u8(b, vdupq_n_u8(mask));
}
template <int shift> inline B16 with_high(B16 low, B16 high) { return vorrq_u8(low, vshlq_n_u8(high, shift)); }
inline B16 look_up(B16 bytes, B16 index) { return vqtbl1q_u8(bytes, index); }
inline void store_steps(int16_t* o, B16 b) {
    vst1q_s16(o, vmovl_s8(vget_low_s8(vreinterpretq_s8_u8(b))));
    vst1q_s16(o + 8, vmovl_s8(vget_high_s8(vreinterpretq_s8_u8(b))));
}
#else
inline B16 load16(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
inline B16 low_nibbles(B16 b) { return _mm_and_si128(b, _mm_set1_epi8(15)); }
inline B16 high_nibbles(B16 b) { return _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15)); }
inline B16 in_turn_low(B16 a, B16 b) { return _mm_unpacklo_epi8(a, b); }  // a0 b0 a1 b1 … of the lower halves
inline B16 in_turn_high(B16 a, B16 b) { return _mm_unpackhi_epi8(a, b); }
template <int shift, int mask> inline B16 bits_of(B16 b) {
    return _mm_and_si128(_mm_srli_epi16(b, shift), _mm_set1_epi8(mask));
}
template <int shift> inline B16 with_high(B16 low, B16 high) { return _mm_or_si128(low, _mm_slli_epi16(high, shift)); }
inline B16 look_up(B16 bytes, B16 index) {  // 16 bytes by index 0 … 15
#if defined(__SSSE3__)
    return _mm_shuffle_epi8(bytes, index);
#else
    alignas(16) uint8_t from[16], at[16];
    _mm_store_si128((__m128i*)from, bytes);
    _mm_store_si128((__m128i*)at, index);
    for (uint8_t& i : at) i = from[i];
    return _mm_load_si128((const __m128i*)at);
#endif
}
inline void store_steps(int16_t* o, B16 b) {  // 16 signed bytes as 16-bit numbers
#if defined(__AVX2__)
    _mm256_storeu_si256((__m256i*)o, _mm256_cvtepi8_epi16(b));
#else
    _mm_storeu_si128((__m128i*)o, _mm_srai_epi16(_mm_unpacklo_epi8(b, b), 8));
    _mm_storeu_si128((__m128i*)(o + 8), _mm_srai_epi16(_mm_unpackhi_epi8(b, b), 8));
#endif
}
#endif

// A half-precision scale. One that is not finite stands for a damaged group: NaN, whatever it is multiplied by.
inline float half_scale(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
#if defined(__F16C__)
    if (__builtin_expect((h & 0x7C00u) == 0x7C00u, 0)) return bits_to_float(QUIET_NAN);
    return _cvtsh_ss(h);
#endif
    const uint32_t e = (h >> 10) & 31u, m = h & 0x3FFu, sign = uint32_t(h & 0x8000u) << 16;
    if (e == 31) return bits_to_float(QUIET_NAN);
    if (e == 0) return bits_to_float(float_to_bits(float(m) * (1.0f / (1 << 24))) | sign);
    return bits_to_float(sign | ((e + 112u) << 23) | (m << 13));
}
// `count` of them, in order.
inline void half_scales(const uint8_t* p, int64_t count, float* out) {
    int64_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m128i h = _mm_loadu_si128((const __m128i*)(p + 2 * i)), top = _mm_set1_epi16(0x7C00);
        const __m256i damaged = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(_mm_and_si128(h, top), top));
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(QUIET_NAN));
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_cvtph_ps(h), nan, _mm256_castsi256_ps(damaged)));
    }
#endif
    for (; i < count; ++i) out[i] = half_scale(p + 2 * i);
}
inline float single_scale(const uint8_t* p) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    return bits_to_float((bits & 0x7F800000u) == 0x7F800000u ? QUIET_NAN : bits);
}
inline float power_scale(uint8_t e) {  // e8m0: byte 0 is 2^-127, a subnormal; 255 is NaN
    return bits_to_float(e == 255 ? QUIET_NAN : e ? uint32_t(e) << 23 : 0x00400000u);
}

}  // namespace engram::ENGRAM_ISA
