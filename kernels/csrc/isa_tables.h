// What the files in csrc/isa give for each instruction set, and what the active one gives.
#pragma once
#include <cstdint>

#include "encode.h"
#include "gate.h"
#include "hash.h"
#include "rows.h"

namespace engram {

// `known` >= n addresses are valid and may be prefetched.
struct RowTable {
    void (*decode[CODEC_COUNT])(int64_t bytes, int64_t width, const uint8_t* const* rows, int64_t n, int64_t known,
                                float factor, void* out, bool bf16);
    void (*copy)(int64_t bytes, const uint8_t* const* rows, int64_t n, int64_t known, uint8_t* out);
};

struct IsaTable {
    const RowTable* rows;
    HashRows hash_rows, hash_sums;
    RunGateStep gate_step;
    RunProject project;
    const EncodeTable* encode;
};
IsaTable active_table();

}  // namespace engram
