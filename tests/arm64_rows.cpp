// Decodes rows from stdin with the decoders of another processor, for tests/test_arm64.py (cross-compiled, emulated).
// Input, repeated: int32 codec, width, rows, bf16; then the rows' bytes. Output: the decoded values.
#include <cstdio>
#include <vector>

#include "isa.h"
#include "rows.h"

int main() {
    int32_t head[4];
    if (engram::active_isa() != engram::Isa::neon) return 2;
    while (fread(head, sizeof head, 1, stdin) == 1) {
        const int64_t bytes = engram::row_bytes(head[0], head[1]);
        std::vector<uint8_t> table(size_t(bytes) * head[2]), out(size_t(head[1]) * head[2] * (head[3] ? 2 : 4));
        if (fread(table.data(), 1, table.size(), stdin) != table.size()) return 3;
        std::vector<const uint8_t*> rows;
        for (int32_t i = 0; i < head[2]; ++i) rows.push_back(table.data() + i * bytes);
        engram::decode_rows({head[0], 0.37f}, head[1], rows.data(), head[2], out.data(), head[3] != 0);
        fwrite(out.data(), 1, out.size(), stdout);
    }
    return 0;
}
