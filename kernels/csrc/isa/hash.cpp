// N-gram hashes of positions, compiled once per instruction set.
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace engram::ENGRAM_ISA {
namespace {

// x mod p as mathematics has it, 0 … p - 1.
inline int64_t exact_modulo(int64_t x, int64_t p) {
    const int64_t r = x % p;
    return r < 0 ? r + p : r;
}

// The same for p >= 4096, without a division. double(x), 1/p and their product each round once, so the quotient is off
// by less than 3.1 * 2^-53 * 2^63 / p < 0.78; cut off to an integer it leaves a remainder in (-1.78 p, 1.78 p), which
// two conditional additions and one subtraction bring home. The product q * p may wrap: the difference does not.
inline int64_t fast_modulo(int64_t x, int64_t p, double inverse) {
    const int64_t q = int64_t(double(x) * inverse);
    int64_t r = int64_t(uint64_t(x) - uint64_t(q) * uint64_t(p));
    r += (r >> 63) & p;
    r += (r >> 63) & p;
    r -= p;
    return r + ((r >> 63) & p);
}

constexpr int64_t BLOCK = 256;  // positions whose mixes lie in the first-level cache

#if defined(__AVX512F__)
// Up to eight heads of one order, n positions; the rows of a position lie `stride` numbers after those of the last.
// Here the quotient is rounded down, so one addition and one subtraction do; as unsigned numbers, what lies below zero
// is larger than any remainder, and a minimum takes the place of a comparison.
void eight_heads(const int64_t* mixed, int64_t n, int64_t heads, const int64_t* primes, const int64_t* offsets,
                 const double* inverses, int64_t* out, int64_t stride) {
    const __mmask8 lanes = __mmask8(heads >= 8 ? 255 : (1 << heads) - 1);
    const __m512i p = _mm512_mask_loadu_epi64(_mm512_set1_epi64(4099), lanes, primes);
    const __m512d inverse = _mm512_maskz_loadu_pd(lanes, inverses);
    const __m512i offset = _mm512_maskz_loadu_epi64(lanes, offsets);
    for (int64_t i = 0; i < n; ++i, out += stride) {
        const __m512i x = _mm512_set1_epi64(mixed[i]);
        const __m512d ratio = _mm512_mul_pd(_mm512_set1_pd(double(mixed[i])), inverse);
        const __m512i q = _mm512_cvt_roundpd_epi64(ratio, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        __m512i r = _mm512_sub_epi64(x, _mm512_mullo_epi64(q, p));
        r = _mm512_min_epu64(r, _mm512_add_epi64(r, p));
        r = _mm512_min_epu64(r, _mm512_sub_epi64(r, p));
        _mm512_mask_storeu_epi64(out, lanes, _mm512_add_epi64(r, offset));
    }
}
#endif

void rows(const int64_t* orders, int64_t order_count, int64_t heads, const int64_t* multipliers, const int64_t* primes,
          const int64_t* offsets, const double* inverses, bool divide, const int64_t* const* tokens, int64_t n,
          int64_t* out) {
    const int64_t columns = order_count * heads;
    int64_t mixed[BLOCK];
    for (int64_t begin = 0; begin < n; begin += BLOCK, out += BLOCK * columns) {
        const int64_t count = n - begin < BLOCK ? n - begin : BLOCK;
        int64_t k = 0;
        for (int64_t o = 0; o < order_count; ++o) {
            for (; k < orders[o]; ++k) {
                const int64_t* from = tokens[k] + begin;
                const uint64_t by = uint64_t(multipliers[k]);
                if (k == 0)
                    for (int64_t i = 0; i < count; ++i) mixed[i] = int64_t(uint64_t(from[i]) * by);
                else
                    for (int64_t i = 0; i < count; ++i) mixed[i] ^= int64_t(uint64_t(from[i]) * by);
            }
            const int64_t c = o * heads;
            if (divide) {
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t h = 0; h < heads; ++h)
                        out[i * columns + c + h] = exact_modulo(mixed[i], primes[c + h]) + offsets[c + h];
                continue;
            }
#if defined(__AVX512F__)
            for (int64_t h = 0; h < heads; h += 8)
                eight_heads(mixed, count, heads - h, primes + c + h, offsets + c + h, inverses + c + h, out + c + h,
                            columns);
#else
            for (int64_t i = 0; i < count; ++i)
                for (int64_t h = 0; h < heads; ++h)
                    out[i * columns + c + h] = fast_modulo(mixed[i], primes[c + h], inverses[c + h]) + offsets[c + h];
#endif
        }
    }
}

// The same where products are added: `multipliers` [columns][highest order], each column by its own.
void sums(const int64_t* orders, int64_t order_count, int64_t heads, const int64_t* multipliers, const int64_t* primes,
          const int64_t* offsets, const double* inverses, bool divide, const int64_t* const* tokens, int64_t n,
          int64_t* out) {
    const int64_t columns = order_count * heads, depth = orders[order_count - 1];
    int64_t total[BLOCK];
    for (int64_t begin = 0; begin < n; begin += BLOCK, out += BLOCK * columns) {
        const int64_t count = n - begin < BLOCK ? n - begin : BLOCK;
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t p = primes[c], offset = offsets[c];
            for (int64_t k = 0; k < orders[c / heads]; ++k) {
                const int64_t* from = tokens[k] + begin;
                const uint64_t by = uint64_t(multipliers[c * depth + k]);
                for (int64_t i = 0; i < count; ++i)
                    total[i] = int64_t((k ? uint64_t(total[i]) : 0) + uint64_t(from[i]) * by);
            }
            if (divide)
                for (int64_t i = 0; i < count; ++i) total[i] = exact_modulo(total[i], p) + offset;
            else
                for (int64_t i = 0; i < count; ++i) total[i] = fast_modulo(total[i], p, inverses[c]) + offset;
            for (int64_t i = 0; i < count; ++i) out[i * columns + c] = total[i];
        }
    }
}

}  // namespace

using HashRows = decltype(&rows);
extern const HashRows hash_rows;
const HashRows hash_rows = rows;
extern const HashRows hash_sums;
const HashRows hash_sums = sums;

}  // namespace engram::ENGRAM_ISA
