// Encoders of h4 to h1, compiled once per instruction set: kernels/hadamard_codecs.py step by step, the same bits.
#include <cmath>
#include <utility>

#include "../encode.h"
#include "../encode_parts.h"
#include "../hadamard.h"

namespace engram::ENGRAM_ISA {
namespace {

using Row = float __attribute__((vector_size(4 * W)));
using I32 = int32_t __attribute__((vector_size(4 * W)));

template <int... I> inline Row mixed(Row a, Row b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, I32{I...});
#endif
}
// Lanes at distance h: a and b become a + b and a - b.
template <int h, int... I> inline Row stage(Row v, std::integer_sequence<int, I...>) {
    const Row other = mixed<(I ^ h)...>(v, v);
    return mixed<(I & h ? I + W : I)...>(v + other, other - v);
}
template <int h> inline Row lane_stages_up_to(Row v, int64_t block) {
    if constexpr (h < W)
        return h < block ? lane_stages_up_to<2 * h>(stage<h>(v, std::make_integer_sequence<int, W>()), block) : v;
    else return v;
}

// y is followed by W numbers that may be written. Rounded sums: h ascends, as the reference has it.
void butterflies(float* y, int64_t D, int64_t block) {
    for (int64_t i = 0; i < D; i += W) {
        Row v;
        memcpy(&v, y + i, sizeof v);
        v = lane_stages_up_to<1>(v, block);
        memcpy(y + i, &v, sizeof v);
    }
    for (int64_t h = W; h < block; h *= 2)
        for (int64_t i = 0; i < D; i += 2 * h)
            for (int64_t k = i; k < i + h; k += W) {
                Row a, b;
                memcpy(&a, y + k, sizeof a);
                memcpy(&b, y + k + h, sizeof b);
                const Row sum = a + b, difference = a - b;
                memcpy(y + k, &sum, sizeof sum);
                memcpy(y + k + h, &difference, sizeof difference);
            }
}

// Bits `low` … of the codes to a plane: byte i has column i + k * D * bits / 8 in its bits k * bits and up.
template <int bits> uint8_t* put_plane(const int32_t* codes, int64_t D, int low, uint8_t* out) {
    const int64_t each = D * bits / 8;
    for (int64_t i = 0; i < each; ++i) {
        int32_t byte = 0;
        for (int k = 0; k < 8 / bits; ++k) byte |= (codes[k * each + i] >> low & ((1 << bits) - 1)) << (k * bits);
        out[i] = uint8_t(byte);
    }
    return out + each;
}

template <int BITS> struct Planes {
    static uint8_t* put(const int32_t* codes, int64_t D, uint8_t* out) { return put_plane<BITS>(codes, D, 0, out); }
};
template <> struct Planes<3> {
    static uint8_t* put(const int32_t* codes, int64_t D, uint8_t* out) {
        return put_plane<1>(codes, D, 2, put_plane<2>(codes, D, 0, out));
    }
};

template <class H> bool row(const float* x, int64_t D, uint8_t* out) {
    if (largest_bits(x, D) >= INFINITE) return false;
    constexpr int ENTRIES = 1 << H::BITS;
    alignas(64) float y[WIDEST_ROTATED + 16], chosen[WIDEST_ROTATED + 16];
    alignas(64) int32_t codes[WIDEST_ROTATED + 16];
    for (int64_t j = 0; j < D; ++j) y[j] = bits_to_float(bits_at(x + j) ^ SIGNS.of[j]);
    for (int64_t j = D; j < D + 16; ++j) y[j] = 0.0f;
    const int64_t block = D & -D;
    butterflies(y, D, block);
    const double whole = ordered_sum(y, y, D);
    float g = float(H::RMS) * finite_reciprocal(float(std::sqrt(whole / double(D))));
    if ((float_to_bits(g) & MAGNITUDE) >= INFINITE) g = 0.0f;
    for (int64_t j = 0; j < D; j += W) {
        Row v;
        memcpy(&v, y + j, sizeof v);
        v *= g;
        I32 code = {};
        Row step = Row{} + float(H::BOOK[0]);
        for (int k = 0; k + 1 < ENTRIES; ++k) {  // the middles are exact
            const I32 above = I32(v > Row{} + 0.5f * float(H::BOOK[k] + H::BOOK[k + 1]));  // true is -1
            code -= above;
            step += __builtin_convertvector(above, Row) * float(H::BOOK[k] - H::BOOK[k + 1]);
        }
        memcpy(codes + j, &code, sizeof code);
        memcpy(chosen + j, &step, sizeof step);
    }
    for (int64_t j = D; j < D + 8; ++j) chosen[j] = 0.0f;
    const double along = ordered_sum(y, chosen, D);
    const double scale = along != 0.0 ? whole / along : 0.0;
    return put_half(float(scale * (double(H::RMS) / std::sqrt(double(block)))), Planes<H::BITS>::put(codes, D, out));
}

template <class H> bool rows_of(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    bool good = true;
    for (int64_t r = 0; r < n; ++r) good &= row<H>(rows + r * pitch, D, out + r * bytes);
    return good;
}

}  // namespace

bool encode_h4(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    return rows_of<FourBits>(bytes, D, rows, pitch, n, out);
}
bool encode_h3(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    return rows_of<ThreeBits>(bytes, D, rows, pitch, n, out);
}
bool encode_h2(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    return rows_of<TwoBits>(bytes, D, rows, pitch, n, out);
}
bool encode_h1(int64_t bytes, int64_t D, const float* rows, int64_t pitch, int64_t n, uint8_t* out) {
    return rows_of<OneBit>(bytes, D, rows, pitch, n, out);
}

}  // namespace engram::ENGRAM_ISA
