// CRC-32 as zlib computes it: carry-less multiplication on x86, the CRC instructions on Arm, tables elsewhere.
//
// Folding: a message polynomial may be replaced by any polynomial congruent to it modulo P. Sixteen bytes that stand n
// bits before others are moved onto them by multiplying their halves with x^(n+32) and x^(n-32) mod P (bit-reflected,
// one bit up, since the product of reflected numbers comes out one bit low).
#include <array>
#include <cstring>

#include "rows.h"

#if defined(ENGRAM_X86)
#include <immintrin.h>
#elif defined(ENGRAM_ARM)
#include <arm_acle.h>
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace engram {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 16>;

// tables[k][b]: the remainder of byte b followed by k zero bytes.
constexpr Tables make_tables() {
    Tables t{};
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t r = b;
        for (int bit = 0; bit < 8; ++bit) r = r >> 1 ^ (r & 1 ? 0xEDB88320u : 0u);
        t[0][b] = r;
    }
    for (int k = 1; k < 16; ++k)
        for (uint32_t b = 0; b < 256; ++b) t[k][b] = t[k - 1][b] >> 8 ^ t[0][t[k - 1][b] & 255];
    return t;
}
constexpr Tables TABLES = make_tables();

// The remainder without the inversions at start and end.
uint32_t by_tables(uint32_t r, const uint8_t* p, size_t n) {
    for (; n >= 16; n -= 16, p += 16) {
        const uint8_t first[4] = {uint8_t(r), uint8_t(r >> 8), uint8_t(r >> 16), uint8_t(r >> 24)};
        uint32_t next = 0;
        for (int i = 0; i < 16; ++i) next ^= TABLES[15 - i][i < 4 ? p[i] ^ first[i] : p[i]];
        r = next;
    }
    for (; n; --n, ++p) r = r >> 8 ^ TABLES[0][(r ^ *p) & 255];
    return r;
}

#if defined(ENGRAM_X86)
// x^n mod P, bit-reflected, one bit up.
constexpr uint64_t power(int n) {
    uint32_t r = 1;  // x^0, not reflected
    for (int i = 0; i < n; ++i) r = r << 1 ^ (r & 0x80000000u ? 0x04C11DB7u : 0u);
    uint64_t reflected = 0;
    for (int i = 0; i < 32; ++i) reflected |= uint64_t(r >> i & 1) << (31 - i);
    return reflected << 1;
}

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i earlier, __m128i constants, __m128i later) {
    const __m128i low = _mm_clmulepi64_si128(earlier, constants, 0x00);
    const __m128i high = _mm_clmulepi64_si128(earlier, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), later);
}

__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t r, const uint8_t* p, size_t n) {
    constexpr uint64_t far_low = power(512 + 32), far_high = power(512 - 32);
    constexpr uint64_t near_low = power(128 + 32), near_high = power(128 - 32);
    const __m128i far = _mm_set_epi64x(int64_t(far_high), int64_t(far_low));
    const __m128i near = _mm_set_epi64x(int64_t(near_high), int64_t(near_low));
    const auto load = [](const uint8_t* at) { return _mm_loadu_si128((const __m128i*)at); };
    __m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128(int(r))), b = load(p + 16), c = load(p + 32), d = load(p + 48);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
        a = fold(a, far, load(p));
        b = fold(b, far, load(p + 16));
        c = fold(c, far, load(p + 32));
        d = fold(d, far, load(p + 48));
    }
    a = fold(fold(fold(a, near, b), near, c), near, d);
    uint8_t rest[16];
    _mm_storeu_si128((__m128i*)rest, a);
    return by_tables(by_tables(0, rest, 16), p, n);
}
#elif defined(ENGRAM_ARM)
__attribute__((target("+crc"))) uint32_t by_instruction(uint32_t r, const uint8_t* p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        r = __crc32d(r, word);
    }
    for (; n; --n, ++p) r = __crc32b(r, *p);
    return r;
}
#endif

using Way = uint32_t (*)(uint32_t, const uint8_t*, size_t);

Way best() {
#if defined(ENGRAM_X86)
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"))
        return [](uint32_t r, const uint8_t* p, size_t n) { return n < 64 ? by_tables(r, p, n) : by_folding(r, p, n); };
#elif defined(ENGRAM_ARM)
#ifdef __linux__
    if (getauxval(AT_HWCAP) & HWCAP_CRC32) return by_instruction;
#else
    return by_instruction;  // every Apple processor has it
#endif
#endif
    return by_tables;
}

}  // namespace

uint32_t crc32(const uint8_t* bytes, size_t count) {
    static const Way way = best();
    return ~way(0xFFFFFFFFu, bytes, count);
}

uint32_t crc32_tables(const uint8_t* bytes, size_t count) { return ~by_tables(0xFFFFFFFFu, bytes, count); }

}  // namespace engram
