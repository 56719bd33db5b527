// Encoding and its errors for Python (kernels/cpu.py).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "isa_tables.h"
#include "threads.h"

namespace nb = nanobind;
using namespace engram;

namespace {

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Encoded = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t GRAIN_VALUES = 1 << 15;  // below that another thread costs more than it brings
constexpr int64_t DECODED = 1 << 13;       // values decoded at a time: they stay in the nearest cache

int64_t grain(int64_t width) { return width < GRAIN_VALUES ? GRAIN_VALUES / width : 1; }

bool can_encode(int codec) { return codec >= 0 && codec < CODEC_COUNT && active_table().encode->encode[codec]; }

// False where a row holds something that the codec cannot: the caller finds out what.
bool encode(int codec, const Rows& rows, const Bytes& out, int threads) {
    const int64_t n = int64_t(rows.shape(0)), width = int64_t(rows.shape(1)), pitch = rows.stride(0);
    const int64_t bytes = can_encode(codec) ? row_bytes(codec, width) : -1;
    if (bytes < 0 || int64_t(out.shape(0)) != n || int64_t(out.shape(1)) != bytes || rows.stride(1) != 1)
        throw std::invalid_argument("rows of float32 side by side, and out of the codec's bytes for each");
    nb::gil_scoped_release released;
    const EncodeRows work = active_table().encode->encode[codec];
    std::atomic<bool> good{true};
    parallel_for(n, grain(width), threads, [&](int64_t begin, int64_t end) {
        if (!work(bytes, width, rows.data() + begin * pitch, pitch, end - begin, out.data() + begin * bytes)) good = false;
    });
    return good;
}

void row_errors(int codec, float factor, const Encoded& encoded, const Rows& rows, const Sums& lost, const Sums& whole, int threads) {
    const int64_t n = int64_t(rows.shape(0)), width = int64_t(rows.shape(1)), pitch = rows.stride(0);
    const int64_t bytes = codec >= 0 && codec < CODEC_COUNT ? row_bytes(codec, width) : -1;
    if (bytes < 0 || int64_t(encoded.shape(0)) != n || int64_t(encoded.shape(1)) != bytes || rows.stride(1) != 1 ||
        int64_t(lost.size()) != n || int64_t(whole.size()) != n)
        throw std::invalid_argument("as many rows of the codec's bytes, of values and of sums");
    nb::gil_scoped_release released;
    const SumErrors sum = active_table().encode->errors;
    const int64_t step = width < DECODED ? DECODED / width : 1;
    parallel_for(n, grain(width), threads, [&](int64_t begin, int64_t end) {
        std::vector<float> back(static_cast<size_t>(step * width));
        std::vector<const uint8_t*> at(static_cast<size_t>(step));
        for (int64_t i = begin; i < end; i += step) {
            const int64_t count = end - i < step ? end - i : step;
            for (int64_t k = 0; k < count; ++k) at[size_t(k)] = encoded.data() + (i + k) * bytes;
            decode_rows({codec, factor}, width, at.data(), count, back.data(), false);
            sum(width, rows.data() + i * pitch, pitch, back.data(), count, lost.data() + i, whole.data() + i);
        }
    });
}

}  // namespace

void bind_encode(nb::module_& m) {
    m.def("can_encode", &can_encode);
    m.def("encode", &encode, nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
    m.def("row_errors", &row_errors, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
          nb::arg().noconvert(), nb::arg());
}
