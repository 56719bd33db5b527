// Row decoders, compiled once per instruction set. Layouts and rules: kernels/codecs.py and kernels/csrc/simd.h.
#include "../hadamard.h"
#include "../isa_tables.h"
#include "../rows.h"
#include "../simd.h"

namespace engram::ENGRAM_ISA {
namespace {

constexpr int GROUP = 32;   // values that share a scale
constexpr int AHEAD = 8;    // rows prefetched ahead; 4 to 32 measure alike
constexpr int STAGED = 8;   // rows copied to the first-level cache before they are decoded

// Two vectors of bf16 leave in one store where a vector of both has the full width.
template <class T> constexpr bool PAIRS = W == 16 && sizeof(T) == 2;
#if !defined(__AVX512F__)
inline void store_two(float*, V, V) {}  // never called: PAIRS is false
inline void store_two(uint16_t*, V, V) {}
#endif

// Run f<0>, f<1>, … for the W-lane parts of 16 bytes.
template <class F> inline void each_part(F f) {
    f.template operator()<0>();
    if constexpr (W <= 8) f.template operator()<1>();
    if constexpr (W <= 4) { f.template operator()<2>(); f.template operator()<3>(); }
}
template <class T> struct SignedPut {
    B16 b; V s; T* o;
    template <int j> void operator()() { store(o + j * W, mul(signed_part<j>(b), s)); }
};
template <class T> struct FloatPut {
    B16 b; V s; T* o;
    template <int j> void operator()() { store(o + j * W, mul(e4m3_part<j>(b), s)); }
};
template <class T> struct BookPut {
    const Book& book; B16 index; V s; T* o;
    template <int j> void operator()() { store(o + j * W, mul(book_part<j>(book, index), s)); }
};

template <class T> inline void signed_values(const uint8_t* p, int64_t n, float scale, T* o) {
    const V s = set1(scale);
    int64_t i = 0;
    if constexpr (PAIRS<T>)
        for (; i + 32 <= n; i += 32)
            store_two(o + i, mul(signed_part<0>(load16(p + i)), s), mul(signed_part<0>(load16(p + i + 16)), s));
    for (; i + 16 <= n; i += 16) each_part(SignedPut<T>{load16(p + i), s, o + i});
    for (; i < n; ++i) put(o + i, float(int8_t(p[i])) * scale);
}
template <class T> inline void e4m3_values(const uint8_t* p, int64_t n, float scale, T* o) {
    const V s = set1(scale);
    int64_t i = 0;
    if constexpr (PAIRS<T>)
        for (; i + 32 <= n; i += 32)
            store_two(o + i, mul(e4m3_part<0>(load16(p + i)), s), mul(e4m3_part<0>(load16(p + i + 16)), s));
    for (; i + 16 <= n; i += 16) each_part(FloatPut<T>{load16(p + i), s, o + i});
    for (; i < n; ++i) put(o + i, e4m3_of(p[i]) * scale);
}
// n values of a group in n / 2 bytes: low nibbles first, then high ones.
template <class T> inline void book_values(const Book& book, const float* entries, const uint8_t* p, int64_t n,
                                           float scale, T* o) {
    if (n == GROUP) {
        const V s = set1(scale);
        const B16 b = load16(p);
        if constexpr (PAIRS<T>) {
            store_two(o, mul(book_part<0>(book, low_nibbles(b)), s), mul(book_part<0>(book, high_nibbles(b)), s));
            return;
        }
        each_part(BookPut<T>{book, low_nibbles(b), s, o});
        each_part(BookPut<T>{book, high_nibbles(b), s, o + 16});
        return;
    }
    for (int64_t i = 0; i < n / 2; ++i) {
        put(o + i, entries[p[i] & 15] * scale);
        put(o + n / 2 + i, entries[p[i] >> 4] * scale);
    }
}

alignas(64) const float NF4_BOOK[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
alignas(64) const float Q4_BOOK[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) const float IQ4_BOOK[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(64) const float E2M1_BOOK[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

struct Float32 {
    static constexpr bool staged = false;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        int64_t i = 0;
        for (; i + W <= D; i += W) store<true>(o + i, load_f32(p + 4 * i));
        for (; i < D; ++i) { uint32_t bits; memcpy(&bits, p + 4 * i, 4); put(o + i, bits_to_float(bits)); }
    }
    static void row(const uint8_t* p, int64_t D, float, float* o) { memcpy(o, p, 4 * size_t(D)); }
};
struct BFloat16 {
    static constexpr bool staged = false;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        int64_t i = 0;
        for (; i + W <= D; i += W) store<true>(o + i, load_bf16(p + 2 * i));
        for (; i < D; ++i) { uint16_t h; memcpy(&h, p + 2 * i, 2); put(o + i, bits_to_float(uint32_t(h) << 16)); }
    }
};
struct Int8Row {
    static constexpr bool staged = false;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        signed_values(p, D, single_scale(p + D), o);
    }
};
// Rows with their half-precision scales at the end: the scales of a run of groups are converted together.
constexpr int64_t RUN = 8 * GROUP;

struct Int8 {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        float scale[RUN / GROUP];
        for (int64_t begin = 0; begin < D; begin += RUN) {
            const int64_t n = D - begin < RUN ? D - begin : RUN;
            half_scales(p + D + begin / GROUP * 2, (n + GROUP - 1) / GROUP, scale);
            for (int64_t g = 0; g < n; g += GROUP)
                signed_values(p + begin + g, n - g < GROUP ? n - g : GROUP, scale[g / GROUP], o + begin + g);
        }
    }
};
struct Nf4 {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        const Book book = load_book(NF4_BOOK);
        float scale[RUN / GROUP];
        for (int64_t begin = 0; begin < D; begin += RUN) {
            const int64_t n = D - begin < RUN ? D - begin : RUN;
            half_scales(p + D / 2 + begin / GROUP * 2, (n + GROUP - 1) / GROUP, scale);
            for (int64_t g = 0; g < n; g += GROUP)
                book_values(book, NF4_BOOK, p + (begin + g) / 2, n - g < GROUP ? n - g : GROUP, scale[g / GROUP],
                            o + begin + g);
        }
    }
};
struct Fp8E8m0 {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        for (int64_t g = 0; g < D; g += GROUP)
            e4m3_values(p + g, D - g < GROUP ? D - g : GROUP, power_scale(p[D + g / GROUP]), o + g);
    }
};
struct GgufQ8 {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        for (int64_t g = 0; g < D; g += GROUP, p += 34) signed_values(p + 2, GROUP, half_scale(p), o + g);
    }
};
template <const float* ENTRIES> struct GgufBook {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        const Book book = load_book(ENTRIES);
        for (int64_t g = 0; g < D; g += GROUP, p += 18) book_values(book, ENTRIES, p + 2, GROUP, half_scale(p), o + g);
    }
};

struct Fp8Row {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float, T* o) {
        e4m3_values(p, D, single_scale(p + D), o);
    }
};
struct Fp8Tensor {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float factor, T* o) { e4m3_values(p, D, factor, o); }
};
template <class T> struct ScaledPut {
    const Book& book; B16 index; V s, f; T* o;
    template <int j> void operator()() { store(o + j * W, mul(mul(book_part<j>(book, index), s), f)); }
};
struct Nvfp4 {
    static constexpr bool staged = true;
    template <class T> static void row(const uint8_t* p, int64_t D, float factor, T* o) {
        const Book book = load_book(E2M1_BOOK);
        const uint8_t* scale = p + D / 2;
        const V f = set1(factor);
        int64_t i = 0;
        for (; i + 32 <= D; i += 32, p += 16, scale += 2) {
            const B16 b = load16(p), low = low_nibbles(b), high = high_nibbles(b);
            const V s = set1(e4m3_of(scale[0])), t = set1(e4m3_of(scale[1]));
            each_part(ScaledPut<T>{book, in_turn_low(low, high), s, f, o + i});
            each_part(ScaledPut<T>{book, in_turn_high(low, high), t, f, o + i + 16});
        }
        for (; i < D; ++i) put(o + i, E2M1_BOOK[p[i % 16 / 2] >> i % 2 * 4 & 15] * e4m3_of(*scale) * factor);
    }
};

inline void prefetch_row(const uint8_t* p, int64_t bytes) {
    const uint8_t* end = p + bytes;
    for (const uint8_t* q = (const uint8_t*)(uintptr_t(p) & ~uintptr_t(63)); q < end; q += 64) __builtin_prefetch(q);
}

// Rows 0 … n of which `known` >= n addresses may be prefetched. Decoders with much arithmetic per value read a copy in
// the first-level cache: waiting for memory inside them would fill the processor's queues and lose parallel misses.
// Those that read up to 15 bytes behind a row always do.
template <class C> struct Overreads { static constexpr bool value = false; };
template <class H> struct Overreads<Hadamard<H>> { static constexpr bool value = true; };

template <class C, class T>
void decode(int64_t bytes, int64_t D, const uint8_t* const* rows, int64_t n, int64_t known, float factor, T* out) {
    for (int64_t r = 0; r < known && r < AHEAD; ++r) prefetch_row(rows[r], bytes);
    constexpr int64_t SLOT = 1152;  // bytes of a staged row: 1088 for q8_0 at D = 1024
    if (C::staged && (bytes <= SLOT || Overreads<C>::value)) {
        alignas(64) uint8_t stage[STAGED * SLOT + 64];
        const int64_t slot = (bytes + 63) & ~int64_t(63), many = bytes <= SLOT ? STAGED : STAGED * SLOT / slot;
        for (int64_t begin = 0; begin < n; begin += many) {
            const int64_t end = begin + many < n ? begin + many : n;
            for (int64_t r = begin; r < end; ++r) {
                if (r + AHEAD < known) prefetch_row(rows[r + AHEAD], bytes);
                memcpy(stage + (r - begin) * slot, rows[r], bytes);
            }
            for (int64_t r = begin; r < end; ++r) C::row(stage + (r - begin) * slot, D, factor, out + r * D);
        }
        return;
    }
    for (int64_t r = 0; r < n; ++r) {
        if (r + AHEAD < known) prefetch_row(rows[r + AHEAD], bytes);
        C::row(rows[r], D, factor, out + r * D);
    }
}
template <class C>
void decoder(int64_t bytes, int64_t D, const uint8_t* const* rows, int64_t n, int64_t known, float factor, void* out,
             bool bf16) {
    if (bf16) decode<C>(bytes, D, rows, n, known, factor, static_cast<uint16_t*>(out));
    else decode<C>(bytes, D, rows, n, known, factor, static_cast<float*>(out));
}
void copier(int64_t bytes, const uint8_t* const* rows, int64_t n, int64_t known, uint8_t* out) {
    for (int64_t r = 0; r < known && r < AHEAD; ++r) prefetch_row(rows[r], bytes);
    for (int64_t r = 0; r < n; ++r) {
        if (r + AHEAD < known) prefetch_row(rows[r + AHEAD], bytes);
        memcpy(out + r * bytes, rows[r], bytes);
    }
}

}  // namespace

extern const RowTable row_table;
const RowTable row_table = {
    {decoder<Float32>, decoder<BFloat16>, decoder<Int8Row>, decoder<Int8>, decoder<Nf4>, decoder<Fp8E8m0>,
     decoder<GgufQ8>, decoder<GgufBook<Q4_BOOK>>, decoder<GgufBook<IQ4_BOOK>>, decoder<Hadamard<FourBits>>,
     decoder<Hadamard<ThreeBits>>, decoder<Hadamard<TwoBits>>, decoder<Fp8Row>, decoder<Fp8Tensor>, decoder<Nvfp4>,
     decoder<Hadamard<OneBit>>},
    copier};

}  // namespace engram::ENGRAM_ISA
