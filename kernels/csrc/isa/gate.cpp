// Gate, convolution and residual of a few positions, compiled once per instruction set. Plain loops: the compiler makes
// vectors of them. Sums run in eight fp64 lanes, because the signed square root magnifies errors of a score near zero.
#include "../gate.h"

#include <math.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace engram::ENGRAM_ISA {
namespace {

constexpr int LANES = 8;

struct Sums {
    double hidden, key, both;
};

// Sums over the width: hidden², key² and hidden * query_norm * key * key_norm.
Sums sums_of(const float* h, const float* k, const float* nq, const float* nk, int64_t D) {
    double a[LANES] = {}, b[LANES] = {}, c[LANES] = {};
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES)
        for (int i = 0; i < LANES; ++i) {
            const double x = h[d + i], y = k[d + i];
            a[i] += x * x;
            b[i] += y * y;
            c[i] += x * double(nq[d + i]) * (y * double(nk[d + i]));
        }
    for (; d < D; ++d) {
        const double x = h[d], y = k[d];
        a[0] += x * x;
        b[0] += y * y;
        c[0] += x * double(nq[d]) * (y * double(nk[d]));
    }
    Sums s = {0, 0, 0};
    for (int i = 0; i < LANES; ++i) s.hidden += a[i], s.key += b[i], s.both += c[i];
    return s;
}

double squares(const float* x, int64_t D) {
    double a[LANES] = {};
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES)
        for (int i = 0; i < LANES; ++i) a[i] += double(x[d + i]) * double(x[d + i]);
    for (; d < D; ++d) a[0] += double(x[d]) * double(x[d]);
    double s = 0;
    for (int i = 0; i < LANES; ++i) s += a[i];
    return s;
}

double opened(double score, int kind) {
    if (kind != GATE_PLAIN) {
        const double size = fabs(score), root = sqrt(size > 1e-6 ? size : 1e-6);
        score = kind == GATE_COPYSIGN ? copysign(root, score) : score > 0 ? root : score < 0 ? -root : 0;
    }
    return 1 / (1 + exp(-score));
}

// exp(x) for |x| <= 87: x = n ln 2 + r with |r| <= ln(2) / 2, the Taylor polynomial of degree 7 in r (remainder under
// 6e-9), and 2^n put into the exponent. The relative error is that of fp32 arithmetic, about 2e-7.
inline float exponential(float x) {
    const float limited = x > 87.0f ? 87.0f : x < -87.0f ? -87.0f : x;
    const float shifted = limited * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    const float n = shifted - 12582912.0f;
    const float r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;   // ln 2 in two parts, the first exact
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// out += SiLU(sum over taps of input * weight) for one position; tap i reads position t - (W - 1 - i) * dilation.
void convolve(const GateStep& s, int64_t b, int64_t t, float* out) {
    const int64_t X = s.branches * s.width;
    const float* from[64];
    for (int64_t i = 0; i < s.taps; ++i) {
        const int64_t at = t - (s.taps - 1 - i) * s.dilation;
        from[i] = at >= 0 ? s.inputs + (b * s.length + at) * X
                  : at + s.kept >= 0 ? s.past + (b * s.kept + at + s.kept) * X : nullptr;
    }
    constexpr int64_t STRIP = 256;
    float sum[STRIP];
    for (int64_t begin = 0; begin < X; begin += STRIP) {
        const int64_t n = X - begin < STRIP ? X - begin : STRIP;
        for (int64_t x = 0; x < n; ++x) sum[x] = 0;
        for (int64_t i = 0; i < s.taps; ++i) {
            if (!from[i]) continue;  // before the text: zeros
            const float *in = from[i] + begin, *weight = s.conv_weight + begin * s.taps + i;
            for (int64_t x = 0; x < n; ++x) sum[x] += in[x] * weight[x * s.taps];
        }
        for (int64_t x = 0; x < n; ++x) out[begin + x] += sum[x] / (1.0f + exponential(-sum[x]));
    }
}

void run(const GateStep& s) {
    const int64_t D = s.width, M = s.branches;
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t t = 0; t < s.length; ++t) {
            const int64_t at = b * s.length + t;
            const bool masked = s.mask && !s.mask[at];
            const float* value = s.value + at * D;
            const double value_squares = s.taps ? squares(value, D) : 0;
            for (int64_t m = 0; m < M; ++m) {
                const float *h = s.hidden + (at * M + m) * D, *k = s.key + (at * M + m) * D;
                float* out = s.out + (at * M + m) * D;
                double gate = 0;
                if (!masked) {
                    const Sums sums = sums_of(h, k, s.query_norm + m * D, s.key_norm + m * D, D);
                    const double query_rms = sqrt(sums.hidden / double(D) + s.eps);
                    const double key_rms = sqrt(sums.key / double(D) + s.eps);
                    gate = opened(sums.both / (query_rms * key_rms) / sqrt(double(D)), s.kind);
                }
                const float g = float(gate);
                for (int64_t d = 0; d < D; ++d) out[d] = h[d] + g * value[d];
                if (s.taps) {
                    const float scale = float(gate / sqrt(gate * gate * value_squares / double(D) + s.conv_eps));
                    float* inputs = s.inputs + (at * M + m) * D;
                    const float* norm = s.conv_norm + m * D;
                    for (int64_t d = 0; d < D; ++d) inputs[d] = value[d] * scale * norm[d];
                }
            }
            if (s.taps && !masked) convolve(s, b, t, s.out + at * M * D);
        }
}

constexpr int WIDE = 64;

// IEEE half to float, exactly.
inline float widened(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, size = h & 0x7FFFu;
    float value;
    if (size >= 0x7C00u) {  // infinity, or not a number
        const uint32_t bits = 0x7F800000u | (size << 13);
        memcpy(&value, &bits, 4);
    } else if (size >= 0x400u) {
        const uint32_t bits = (size << 13) + (112u << 23);
        memcpy(&value, &bits, 4);
    } else {
        value = float(size) * (1.0f / 16777216);  // 2^-24: a subnormal
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

inline void widen(const float* from, float* to) { memcpy(to, from, WIDE * sizeof(float)); }
inline void widen(const uint16_t* from, float* to) {
#if defined(__AVX512F__)
    for (int i = 0; i < WIDE; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__)
    for (int i = 0; i < WIDE; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#elif defined(__ARM_NEON)
    for (int i = 0; i < WIDE; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
#else
    for (int i = 0; i < WIDE; ++i) to[i] = widened(from[i]);
#endif
}
inline float one(float w) { return w; }
inline float one(uint16_t w) { return widened(w); }

// <x, w> in fp32 lanes. One row after another, from front to end: weights come from memory, and a processor fetches one
// stream ahead about twice as fast as four (24 GB/s against 13, measured on an EPYC).
template <class T> float dot(const float* x, const T* w, int64_t E) {
    float sums[WIDE] = {}, wide[WIDE];
    int64_t e = 0;
    for (; e + WIDE <= E; e += WIDE) {
        widen(w + e, wide);
        for (int i = 0; i < WIDE; ++i) sums[i] += x[e + i] * wide[i];
    }
    for (int half = WIDE / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    float sum = sums[0];
    for (; e < E; ++e) sum += x[e] * one(w[e]);
    return sum;
}

template <class T> void multiply_by(const Project& p, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
        for (int64_t n = 0; n < p.count; ++n)
            p.out[n * p.outs + o] =
                dot(p.in + n * p.width, static_cast<const T*>(p.weight) + o * p.width, p.width) +
                (p.bias ? p.bias[o] : 0.0f);
}

void multiply(const Project& p, int64_t begin, int64_t end) {
    p.half ? multiply_by<uint16_t>(p, begin, end) : multiply_by<float>(p, begin, end);
}

}  // namespace

extern const RunGateStep gate_step;
const RunGateStep gate_step = run;
extern const RunProject project;
const RunProject project = multiply;

}  // namespace engram::ENGRAM_ISA
