// Rows from standard input through the Arm encoders: "codec width rows row-bytes" as 32-bit numbers, then the rows; the
// bytes go to standard output. tests/test_encode.py compares them.
#include <cstdio>
#include <vector>

#include "encode.h"

namespace engram::neon {
extern const EncodeTable encode_table;
}

int main() {
    int32_t ask[4];
    while (fread(ask, 4, 4, stdin) == 4) {
        const size_t width = size_t(ask[1]), n = size_t(ask[2]), bytes = size_t(ask[3]);
        std::vector<float> rows(width * n);
        std::vector<uint8_t> out(bytes * n, 0xFF);
        if (fread(rows.data(), 4, rows.size(), stdin) != rows.size()) return 1;
        const auto encode = engram::neon::encode_table.encode[ask[0]];
        if (!encode(int64_t(bytes), ask[1], rows.data(), ask[1], ask[2], out.data())) return 2;
        std::vector<double> lost(n), whole(n);  // of the rows against the next ones: some numbers
        engram::neon::encode_table.errors(ask[1], rows.data(), ask[1], rows.data() + width, ask[2] - 1, lost.data(),
                                          whole.data());
        fwrite(out.data(), 1, out.size(), stdout);
        fwrite(lost.data(), 8, n - 1, stdout);
        fwrite(whole.data(), 8, n - 1, stdout);
    }
    return 0;
}
