// The filter of llama.cpp's evaluation callback: of a graph's nodes only those with a wanted name enter Python.
// The callback is `bool (ggml_tensor*, bool ask, void* user)`: asked first whether a node is wanted, called again when
// it was computed. `false` then would end the graph silently: what goes wrong is kept for the caller instead.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace {

using NameOf = const char* (*)(const void* tensor);

// The beginning of a ggml_tensor, as runtime/llama_hook.py has it and compares it with what the library says.
struct GgmlTensor {
    int32_t type;
    void* buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op, op_params[16], flags;
    GgmlTensor* src[10];
    void* view_src;
    size_t view_offs;
    void* data;
    char name[64];
};
constexpr int32_t F32 = 0, I32 = 26;  // ggml_type

using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

class EvalFilter {
public:
    EvalFilter(uintptr_t name_of, std::vector<std::string> names, int64_t width, nb::object hit)
        : name_of_(reinterpret_cast<NameOf>(name_of)), names_(std::move(names)), width_(width), hit_(std::move(hit)) {
        if (!name_of_ || names_.empty()) throw std::invalid_argument("a function that names tensors, and names");
    }

    // Token ids of the batch that comes next.
    void expect(Ids ids) { ids_ = std::move(ids), matched_ = 0; }
    int64_t matched() const { return matched_; }

    uintptr_t callback() const { return reinterpret_cast<uintptr_t>(&EvalFilter::called); }
    uintptr_t user_data() const { return reinterpret_cast<uintptr_t>(this); }
    int64_t asked() const { return asked_; }

    // The exception of a hit, once; None where there was none.
    nb::object take_error() {
        nb::object found = error_.is_valid() ? error_ : nb::none();
        error_ = nb::object();
        return found;
    }

private:
    static bool called(void* tensor, bool ask, void* user) {
        return static_cast<EvalFilter*>(user)->evaluate(tensor, ask);
    }

    int find(const void* tensor) const {
        const char* name = name_of_(tensor);
        for (size_t i = 0; i < names_.size(); ++i)
            if (names_[i] == name) return int(i);
        return -1;
    }

    bool evaluate(void* tensor, bool ask) {
        if (ask) ++asked_;
        const int place = find(tensor);
        if (ask) return place >= 0;
        if (place < 0) return true;
        const auto* found = static_cast<const GgmlTensor*>(tensor);
        if (place == 0 && match(found->src[1])) return true;
        nb::gil_scoped_acquire held;
        if (error_.is_valid()) return true;  // the first one counts
        try {
            nb::object rows = nb::none();
            const bool plain = found->type == F32 && found->ne[0] == width_ && found->ne[2] == 1 &&
                               found->ne[3] == 1 && found->nb[0] == 4 && found->nb[1] == 4 * size_t(width_);
            if (place && plain)
                rows = nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(
                                    found->data, {size_t(found->ne[1]), size_t(width_)}, nb::handle()),
                                nb::rv_policy::reference);
            hit_(place, reinterpret_cast<uintptr_t>(tensor), rows);
        } catch (nb::python_error& wrong) {
            error_ = nb::borrow(wrong.value());
        }
        return true;
    }

    // Whether these are the ids expected next.
    bool match(const GgmlTensor* ids) {
        if (!ids || ids->type != I32 || !ids_.is_valid()) return false;
        const int64_t count = ids->ne[0];
        if (ids->ne[1] != 1 || ids->ne[2] != 1 || ids->ne[3] != 1 || matched_ + count > int64_t(ids_.size()) ||
            memcmp(ids->data, ids_.data() + matched_, size_t(count) * 4))
            return false;
        matched_ += count;
        return true;
    }

    NameOf name_of_;
    std::vector<std::string> names_;
    int64_t width_;
    nb::object hit_, error_;
    Ids ids_;
    int64_t asked_ = 0, matched_ = 0;
};

}  // namespace

void bind_eval(nb::module_& m) {
    nb::class_<EvalFilter>(m, "EvalFilter")
        .def(nb::init<uintptr_t, std::vector<std::string>, int64_t, nb::object>())
        .def_prop_ro("callback", &EvalFilter::callback)
        .def_prop_ro("user_data", &EvalFilter::user_data)
        .def_prop_ro("asked", &EvalFilter::asked)
        .def_prop_ro("matched", &EvalFilter::matched)
        .def("expect", &EvalFilter::expect, nb::arg().noconvert())
        .def("take_error", &EvalFilter::take_error);
}
