// Rows of arrays in memory: gather + decode, gather alone; and the choice of the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "rows.h"
#include "threads.h"

namespace nb = nanobind;
using namespace engram;

namespace {

using Table = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::c_contig, nb::device::cpu>;

constexpr int64_t BLOCK = 1024;  // addresses worked out at a time
constexpr int64_t GRAIN = 2048;  // rows below which another thread costs more than it brings

// Place of the first id outside 0 … rows - 1, or -1.
int64_t first_outside(const int64_t* ids, int64_t n, int64_t rows) {
    uint64_t wrong = 0;
    for (int64_t i = 0; i < n; ++i) wrong |= uint64_t(uint64_t(ids[i]) >= uint64_t(rows));
    if (!wrong) return -1;
    int64_t i = 0;
    while (uint64_t(ids[i]) < uint64_t(rows)) ++i;
    return i;
}

template <class Work> void over_addresses(const Table& table, const int64_t* ids, int64_t n, int threads, Work work) {
    const uint8_t* base = table.data();
    const int64_t pitch = table.stride(0);
    parallel_for(n, GRAIN, threads, [&](int64_t begin, int64_t end) {
        const uint8_t* at[BLOCK + 16];
        for (int64_t i = begin; i < end; i += BLOCK) {
            const int64_t count = end - i < BLOCK ? end - i : BLOCK;
            const int64_t known = end - i < BLOCK + 16 ? end - i : BLOCK + 16;
            for (int64_t k = 0; k < known; ++k) at[k] = base + ids[i + k] * pitch;
            work(at, i, count, known);
        }
    });
}

int64_t gather(int code, float factor, const Table& table, const Ids& ids, const Out& out, int64_t width, int threads) {
    const bool bf16 = out.dtype() == nb::dtype<uint16_t>();
    const int64_t bytes = code < 0 || code >= CODEC_COUNT ? -1 : row_bytes(code, width);
    const int64_t n = int64_t(ids.size());
    if (bytes < 0 || int64_t(table.shape(1)) != bytes || table.stride(1) != 1)
        throw std::invalid_argument("the table's rows are not this codec's");
    if ((!bf16 && out.dtype() != nb::dtype<float>()) || int64_t(out.size()) != n * width)
        throw std::invalid_argument("out must be float32 or uint16 (bf16) of rows * width values");
    nb::gil_scoped_release released;
    const int64_t wrong = first_outside(ids.data(), n, int64_t(table.shape(0)));
    if (wrong >= 0) return wrong;
    uint8_t* target = static_cast<uint8_t*>(out.data());
    const int64_t each = width * (bf16 ? 2 : 4);
    over_addresses(table, ids.data(), n, threads, [&](const uint8_t* const* at, int64_t i, int64_t count, int64_t known) {
        decode_rows({code, factor}, width, at, count, known, target + i * each, bf16);
    });
    return -1;
}

int64_t copy(const Table& table, const Ids& ids, const nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>& out, int threads) {
    const int64_t n = int64_t(ids.size()), bytes = int64_t(table.shape(1));
    if (int64_t(out.size()) != n * bytes || table.stride(1) != 1)
        throw std::invalid_argument("out must be uint8 of rows * row bytes");
    nb::gil_scoped_release released;
    const int64_t wrong = first_outside(ids.data(), n, int64_t(table.shape(0)));
    if (wrong >= 0) return wrong;
    over_addresses(table, ids.data(), n, threads, [&](const uint8_t* const* at, int64_t i, int64_t count, int64_t known) {
        copy_rows(bytes, at, count, known, out.data() + i * bytes);
    });
    return -1;
}

const Isa ALL[] = {Isa::avx512, Isa::avx2, Isa::neon, Isa::baseline};

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (Isa isa : ALL)
        if (isa_available(isa)) names.push_back(isa_name(isa));
    return names;
}

bool use(const std::string& name) {
    for (Isa isa : ALL)
        if (name == isa_name(isa) && isa_available(isa)) {
            force_isa(isa);
            return true;
        }
    return false;
}

}  // namespace

void bind_rows(nb::module_& m) {
    m.def("gather", &gather, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert(),
          nb::arg().noconvert(), nb::arg(), nb::arg());
    m.def("copy_rows", &copy, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
    m.def("row_bytes", [](int codec, int64_t width) {
        return codec < 0 || codec >= CODEC_COUNT ? -1 : row_bytes(codec, width);
    });
    m.def("available_isas", &available);
    m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
    m.def("use_isa", &use);
    m.def("available_threads", &available_threads);
}
