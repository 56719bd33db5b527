// The gate and short convolution of a few positions: kernels/reference.py's gate_step for fp32.
#pragma once
#include <cstdint>

namespace engram {

enum GateKind : int { GATE_PLAIN = 0, GATE_SQRT, GATE_COPYSIGN };

// Letters as in kernels/reference.py. Arrays are contiguous.
struct GateStep {
    int64_t batch, length, branches, width;       // B, T, M, D
    const float *hidden, *key, *value;            // [B, T, M, D], [B, T, M, D], [B, T, D]
    const float *query_norm, *key_norm;           // [M, D]
    double eps;
    int kind;
    const bool* mask;                             // [B, T], or null
    int64_t taps, dilation, kept;                 // W (0: no convolution), dilation, positions in `past`
    const float *conv_norm, *conv_weight, *past;  // [M, D], [M * D, W], [B, kept, M * D]
    double conv_eps;
    float *out, *inputs;                          // [B, T, M, D] (may be `hidden` itself), [B, T, M * D]
};

using RunGateStep = void (*)(const GateStep&);

// A linear map of a few vectors: out[n, o] = <in[n], weight[o]> + bias[o].
struct Project {
    int64_t count, width, outs;  // N, E, O
    const float* in;             // [N, E]
    const void* weight;          // [O, E], float or, if `half`, IEEE half
    bool half;
    const float* bias;           // [O] or null
    float* out;                  // [N, O]
};

using RunProject = void (*)(const Project&, int64_t begin, int64_t end);  // outs begin … end - 1

}  // namespace engram
