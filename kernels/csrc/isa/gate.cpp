// Gate, convolution and residual of a few positions, compiled once per instruction set. Plain loops: the compiler makes
// vectors of them. Sums run in eight fp64 lanes, because the signed square root magnifies errors of a score near zero.
#include "../gate.h"

#include <math.h>
#include <string.h>

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

// <x, w> in fp32 lanes. One row after another, from front to end: weights come from memory, and a processor fetches one
// stream ahead about twice as fast as four (24 GB/s against 13, measured on an EPYC).
float dot(const float* x, const float* w, int64_t E) {
    float sums[WIDE] = {};
    int64_t e = 0;
    for (; e + WIDE <= E; e += WIDE)
        for (int i = 0; i < WIDE; ++i) sums[i] += x[e + i] * w[e + i];
    for (int half = WIDE / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    float sum = sums[0];
    for (; e < E; ++e) sum += x[e] * w[e];
    return sum;
}

void multiply(const Project& p, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
        for (int64_t n = 0; n < p.count; ++n)
            p.out[n * p.outs + o] =
                dot(p.in + n * p.width, p.weight + o * p.width, p.width) + (p.bias ? p.bias[o] : 0.0f);
}

}  // namespace

extern const RunGateStep gate_step;
const RunGateStep gate_step = run;
extern const RunProject project;
const RunProject project = multiply;

}  // namespace engram::ENGRAM_ISA
