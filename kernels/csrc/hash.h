// Token ids to row ids: look-back, wrapping products, XOR and modulo for all orders, heads and layers in one pass.
// The rules are those of Hasher in kernels/reference.py.
#pragma once
#include <cstdint>
#include <vector>

namespace engram {

// One layer's constants. Columns are order-major, head-minor.
struct HashLayer {
    std::vector<int64_t> multipliers;           // [highest order], of sums [columns][highest order]
    std::vector<int64_t> primes, offsets;       // [columns]
    std::vector<double> inverses;               // 1 / prime
    bool divide = false;  // a modulus under 4096 or from 2^60: multiplication would not be exact, or overflow
};

struct HashPlan {
    std::vector<int64_t> orders;                // ascending
    int64_t heads = 0, columns = 0, depth = 0;  // depth: highest order
    std::vector<HashLayer> layers;
    std::vector<int64_t> token_map;             // empty: raw ids are hashed
    int64_t vocab_size = 0;
    bool negative_ids = false;                  // ids below zero pass through
    std::vector<int64_t> dead_ids;
    bool dead_negative = false;
    bool resets = false;
    int64_t reset_id = 0, fill = 0;
    bool sums = false;                          // products are added, not combined by XOR
    bool oldest_first = false;                  // the first multiplier is the oldest token's
};

// Rows [n, columns] of n positions; tokens[k][i] is the token k places before position i, or k after the oldest.
using HashRows = void (*)(const int64_t* orders, int64_t order_count, int64_t heads, const int64_t* multipliers,
                          const int64_t* primes, const int64_t* offsets, const double* inverses, bool divide,
                          const int64_t* const* tokens, int64_t n, int64_t* out);

}  // namespace engram
