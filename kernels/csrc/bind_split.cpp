// Which class of a mixed table each row belongs to, and its rank there (reference.split_rows), for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace {

template <class T, size_t N> using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N> using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

constexpr int64_t AHEAD = 16;  // records that are on their way from memory while one is worked on

// Counts of the four classes; or the place of the first row that has no record.
nb::object split_rows(const In<uint64_t, 2>& records, const In<int64_t, 1>& rows, const Out<int64_t, 1>& places,
                      const Out<int64_t, 1>& ranks) {
    const int64_t n = int64_t(rows.size()), most = 64 * int64_t(records.shape(0));
    if (records.shape(1) != 4 || int64_t(places.size()) != n || int64_t(ranks.size()) != n)
        throw std::invalid_argument("records of 4 numbers; a place and a rank a row");
    const uint64_t* from = records.data();
    const int64_t* row = rows.data();
    std::array<int64_t, 4> counts{};
    int64_t wrong = -1;
    {
        nb::gil_scoped_release released;
        for (int64_t i = 0; i < n && wrong < 0; ++i)
            if (uint64_t(row[i]) >= uint64_t(most)) wrong = i;
        std::vector<uint8_t> classes(size_t(wrong < 0 ? n : 0));
        std::vector<int64_t> found(classes.size());
        for (int64_t i = 0; i < int64_t(classes.size()); ++i) {
            if (i + AHEAD < n) __builtin_prefetch(from + 4 * (row[i + AHEAD] >> 6));
            const uint64_t* record = from + 4 * (row[i] >> 6);
            const int bit = int(row[i] & 63);
            const uint64_t low = record[0] >> bit & 1, high = record[1] >> bit & 1;
            // A plane where the row's bit is 1, its opposite where it is 0: rows of the same class are ones in both.
            const uint64_t same =
                (record[0] ^ (low - 1)) & (record[1] ^ (high - 1)) & ((uint64_t(1) << bit) - 1);
            const uint64_t one = record[2] & 0xFFFFFFFF, two = record[2] >> 32, three = record[3] & 0xFFFFFFFF;
            const uint64_t before[4] = {uint64_t(row[i] & ~int64_t(63)) - (one + two + three), one, two, three};
            const size_t c = size_t(low | high << 1);
            classes[size_t(i)] = uint8_t(c);
            found[size_t(i)] = int64_t(before[c]) + __builtin_popcountll(same);
            ++counts[c];
        }
        int64_t at[4] = {0, counts[0], counts[0] + counts[1], counts[0] + counts[1] + counts[2]};
        for (size_t i = 0; i < classes.size(); ++i) {
            const int64_t to = at[classes[i]]++;
            places.data()[to] = int64_t(i);
            ranks.data()[to] = found[i];
        }
    }
    if (wrong >= 0) return nb::cast(wrong);
    return nb::cast(std::vector<int64_t>(counts.begin(), counts.end()));
}

}  // namespace

void bind_split(nb::module_& m) {
    m.def("split_rows", &split_rows, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
          nb::arg().noconvert());
}
