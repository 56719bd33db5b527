// Hashing, scatter-add and checksums for Python (kernels/cpu.py).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>

#include "isa_tables.h"
#include "rows.h"
#include "threads.h"

namespace nb = nanobind;
using namespace engram;

namespace {

template <class T, size_t N> using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, size_t N> using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Numbers = std::vector<int64_t>;

constexpr int64_t BLOCK = 1024;  // positions whose look-back windows are worked out at a time

class Hasher {
public:
    Hasher(const std::optional<In<int64_t, 1>>& token_map, int64_t vocab_size, bool negative_ids, Numbers orders,
           int64_t heads, const std::vector<Numbers>& multipliers, const std::vector<Numbers>& primes,
           const std::vector<Numbers>& offsets, Numbers dead_ids, bool dead_negative, std::optional<int64_t> reset_id,
           int64_t fill, bool sums, bool oldest_first) {
        plan_.orders = std::move(orders);
        plan_.heads = heads;
        plan_.columns = heads * int64_t(plan_.orders.size());
        plan_.depth = plan_.orders.back();
        if (token_map) plan_.token_map.assign(token_map->data(), token_map->data() + token_map->size());
        plan_.vocab_size = vocab_size, plan_.negative_ids = negative_ids;
        plan_.dead_ids = std::move(dead_ids), plan_.dead_negative = dead_negative;
        plan_.resets = reset_id.has_value(), plan_.reset_id = reset_id.value_or(0), plan_.fill = fill;
        plan_.sums = sums, plan_.oldest_first = oldest_first;
        const int64_t wanted = plan_.depth * (sums ? plan_.columns : 1);
        for (size_t l = 0; l < multipliers.size(); ++l) {
            HashLayer layer;
            layer.multipliers = multipliers[l], layer.primes = primes[l], layer.offsets = offsets[l];
            if (int64_t(layer.multipliers.size()) < wanted || int64_t(layer.primes.size()) != plan_.columns ||
                int64_t(layer.offsets.size()) != plan_.columns)
                throw std::invalid_argument("constants of another number of orders or heads");
            for (int64_t p : layer.primes) {
                if (p < 1) throw std::invalid_argument("a modulus below 1");
                layer.inverses.push_back(1.0 / double(p));
                layer.divide = layer.divide || p < 4096 || p >= int64_t(1) << 60;
            }
            plan_.layers.push_back(std::move(layer));
        }
        if (!plan_.token_map.empty() && int64_t(plan_.token_map.size()) < vocab_size)
            throw std::invalid_argument("the token map is shorter than the vocabulary");
    }

    // Row ids of ids [B, T] in `out`, one [B, T, C] a layer. Returns -1, or 0 where an id is outside the vocabulary.
    int64_t rows(const In<int64_t, 2>& ids, const std::optional<In<bool, 2>>& start, const In<int64_t, 2>& past_ids,
                 const In<bool, 2>& past_start, const In<bool, 2>& past_stop, const Numbers& layers, bool local,
                 const std::vector<Out<int64_t, 3>>& out) const {
        const int64_t B = int64_t(ids.shape(0)), T = int64_t(ids.shape(1)), J = plan_.depth - 1;
        const auto is_past = [&](const auto& a) { return int64_t(a.shape(0)) == B && int64_t(a.shape(1)) == J; };
        if (!is_past(past_ids) || !is_past(past_start) || !is_past(past_stop) || layers.size() != out.size() ||
            (start && (int64_t(start->shape(0)) != B || int64_t(start->shape(1)) != T)))
            throw std::invalid_argument("look-back state of another shape");
        for (size_t l = 0; l < layers.size(); ++l)
            if (layers[l] < 0 || layers[l] >= int64_t(plan_.layers.size()) ||
                int64_t(out[l].size()) != B * T * plan_.columns)
                throw std::invalid_argument("output of another shape");
        std::vector<int64_t*> to;
        for (const auto& o : out) to.push_back(o.data());
        nb::gil_scoped_release released;
        int64_t lowest = 0, highest = -1;
        for (int64_t i = 0; i < B * T; ++i) {
            lowest = std::min(lowest, ids.data()[i]);
            highest = std::max(highest, ids.data()[i]);
        }
        if (highest >= plan_.vocab_size || (lowest < 0 && !plan_.negative_ids)) return 0;
        // Mostly no position of a text stops a look-back: then flags are read only behind its beginning.
        const bool flagged = start || plan_.resets || !plan_.dead_ids.empty() || (plan_.dead_negative && lowest < 0);
        const int64_t block = std::min(BLOCK, T);  // a decode step has one position: no room is cleared for more
        std::vector<int64_t> line(size_t(J + block)), blocked(size_t(block * plan_.depth));
        std::vector<uint8_t> starts(size_t(J + block)), stops(size_t(J + block)), dead(static_cast<size_t>(block));
        std::vector<const int64_t*> tokens(static_cast<size_t>(plan_.depth));
        const Numbers none(static_cast<size_t>(plan_.columns), 0);
        const HashRows work = plan_.sums ? active_table().hash_sums : active_table().hash_rows;
        for (int64_t b = 0; b < B; ++b) {
            for (int64_t j = 0; j < J; ++j) {
                line[j] = past_ids.data()[b * J + j];
                starts[j] = past_start.data()[b * J + j], stops[j] = past_stop.data()[b * J + j];
            }
            for (int64_t begin = 0; begin < T; begin += block) {
                const int64_t n = std::min(block, T - begin), at = b * T + begin;
                compress(ids.data() + at, n, line.data() + J);
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t id = ids.data()[at + i];
                    dead[i] = flagged && is_dead(id);
                    stops[J + i] = flagged && (dead[i] || (plan_.resets && id == plan_.reset_id));
                    starts[J + i] = start ? start->data()[at + i] : false;
                    if (!flagged && i >= J) break;  // the rest stays as it was: zero
                }
                if (flagged || std::any_of(starts.begin(), starts.begin() + J, [](uint8_t f) { return f; }) ||
                    std::any_of(stops.begin(), stops.begin() + J, [](uint8_t f) { return f; }))
                    look_back(line.data(), starts.data(), stops.data(), dead.data(), n, flagged ? n : std::min(n, J),
                              blocked.data(), block, tokens.data());
                else
                    for (int64_t k = 0; k < plan_.depth; ++k) tokens[size_t(k)] = line.data() + J - k;
                if (plan_.oldest_first) std::reverse(tokens.begin(), tokens.end());
                for (size_t l = 0; l < layers.size(); ++l) {
                    const HashLayer& layer = plan_.layers[size_t(layers[l])];
                    work(plan_.orders.data(), int64_t(plan_.orders.size()), plan_.heads, layer.multipliers.data(),
                         layer.primes.data(), local ? none.data() : layer.offsets.data(), layer.inverses.data(),
                         layer.divide, tokens.data(), n, to[l] + at * plan_.columns);
                }
                for (int64_t j = 0; j < J; ++j)
                    line[j] = line[n + j], starts[j] = starts[n + j], stops[j] = stops[n + j];
            }
        }
        return -1;
    }

private:
    void compress(const int64_t* ids, int64_t n, int64_t* to) const {
        const int64_t* map = plan_.token_map.data();
        if (plan_.token_map.empty()) std::copy(ids, ids + n, to);
        else
            for (int64_t i = 0; i < n; ++i) to[i] = ids[i] < 0 ? ids[i] : map[ids[i]];
    }
    bool is_dead(int64_t id) const {
        if (plan_.dead_negative && id < 0) return true;
        for (int64_t d : plan_.dead_ids)
            if (d == id) return true;
        return false;
    }
    // Tokens [depth][block], `fill` where the walk back is blocked; behind the first `some` positions nothing is.
    void look_back(const int64_t* line, const uint8_t* starts, const uint8_t* stops, const uint8_t* dead, int64_t n,
                   int64_t some, int64_t* to, int64_t block, const int64_t** tokens) const {
        const int64_t depth = plan_.depth, J = depth - 1;
        for (int64_t k = 0; k < depth; ++k) {
            tokens[k] = to + k * block;
            std::copy(line + J - k + some, line + J - k + n, to + k * block + some);
        }
        for (int64_t i = 0; i < some; ++i) {
            bool stopped = dead[i];
            to[i] = stopped ? plan_.fill : line[J + i];
            for (int64_t k = 1; k < depth; ++k) {
                stopped |= starts[J + i - k + 1] | stops[J + i - k];
                to[k * block + i] = stopped ? plan_.fill : line[J + i - k];
            }
        }
    }

    HashPlan plan_;
};

// Distinct rows ascending, and the sums of their values in order of appearance, each beginning with 0.
nb::tuple scatter_add(const In<int64_t, 1>& rows, const In<float, 2>& values) {
    const int64_t n = int64_t(rows.size()), D = int64_t(values.shape(1));
    if (int64_t(values.shape(0)) != n) throw std::invalid_argument("one row of values a row id");
    auto* distinct = new Numbers;
    std::unique_ptr<Numbers> keep(distinct);
    float* sums = nullptr;
    {
        nb::gil_scoped_release released;
        std::vector<std::pair<int64_t, int64_t>> order(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) order[size_t(i)] = {rows.data()[i], i};
        std::sort(order.begin(), order.end());
        Numbers begin;
        for (int64_t i = 0; i < n; ++i)
            if (!i || order[size_t(i)].first != order[size_t(i - 1)].first) {
                distinct->push_back(order[size_t(i)].first);
                begin.push_back(i);
            }
        begin.push_back(n);
        sums = new float[distinct->size() * size_t(D) + 1];
        parallel_for(int64_t(distinct->size()), 4096, 0, [&](int64_t first, int64_t last) {
            for (int64_t u = first; u < last; ++u) {
                float* to = sums + u * D;
                std::fill(to, to + D, 0.0f);
                for (int64_t i = begin[size_t(u)]; i < begin[size_t(u + 1)]; ++i) {
                    const float* from = values.data() + order[size_t(i)].second * D;
                    for (int64_t d = 0; d < D; ++d) to[d] += from[d];
                }
            }
        });
    }
    const size_t count = distinct->size();
    nb::capsule of_sums(sums, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    nb::capsule of_rows(keep.release(), [](void* p) noexcept { delete static_cast<Numbers*>(p); });
    return nb::make_tuple(nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>(distinct->data(), {count}, of_rows),
                          nb::ndarray<nb::numpy, float, nb::ndim<2>>(sums, {count, size_t(D)}, of_sums));
}

void crc32_pages(const In<uint8_t, 2>& pages, const Out<uint32_t, 1>& out, bool tables) {
    if (out.size() != pages.shape(0)) throw std::invalid_argument("one checksum a page");
    nb::gil_scoped_release released;
    const size_t bytes = pages.shape(1);
    for (size_t i = 0; i < pages.shape(0); ++i)
        out.data()[i] = (tables ? crc32_tables : engram::crc32)(pages.data() + i * bytes, bytes);
}

}  // namespace

void bind_ops(nb::module_& m) {
    nb::class_<Hasher>(m, "Hasher")
        .def(nb::init<const std::optional<In<int64_t, 1>>&, int64_t, bool, Numbers, int64_t, const std::vector<Numbers>&,
                      const std::vector<Numbers>&, const std::vector<Numbers>&, Numbers, bool, std::optional<int64_t>,
                      int64_t, bool, bool>(),
             nb::arg("token_map").none(), nb::arg("vocab_size"), nb::arg("negative_ids"), nb::arg("orders"),
             nb::arg("heads"), nb::arg("multipliers"), nb::arg("primes"), nb::arg("offsets"), nb::arg("dead_ids"),
             nb::arg("dead_negative"), nb::arg("reset_id").none(), nb::arg("fill"), nb::arg("sums"),
             nb::arg("oldest_first"))
        .def("rows", &Hasher::rows, nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg());
    m.def("scatter_add", &scatter_add, nb::arg().noconvert(), nb::arg().noconvert());
    m.def("crc32_pages", &crc32_pages, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg());
}
