// The filter of llama.cpp's evaluation callback: of a graph's nodes only those with a wanted name enter Python.
// The callback is `bool (ggml_tensor*, bool ask, void* user)`: asked first whether a node is wanted, called again when
// it was computed. `false` then would end the graph silently: what goes wrong is kept for the caller instead.
#include <nanobind/nanobind.h>
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

class EvalFilter {
public:
    EvalFilter(uintptr_t name_of, std::vector<std::string> names, nb::object hit)
        : name_of_(reinterpret_cast<NameOf>(name_of)), names_(std::move(names)), hit_(std::move(hit)) {
        if (!name_of_ || names_.empty()) throw std::invalid_argument("a function that names tensors, and names");
    }

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
        nb::gil_scoped_acquire held;
        if (error_.is_valid()) return true;  // the first one counts
        try {
            hit_(place, reinterpret_cast<uintptr_t>(tensor));
        } catch (nb::python_error& wrong) {
            error_ = nb::borrow(wrong.value());
        }
        return true;
    }

    NameOf name_of_;
    std::vector<std::string> names_;
    nb::object hit_, error_;
    int64_t asked_ = 0;
};

}  // namespace

void bind_eval(nb::module_& m) {
    nb::class_<EvalFilter>(m, "EvalFilter")
        .def(nb::init<uintptr_t, std::vector<std::string>, nb::object>())
        .def_prop_ro("callback", &EvalFilter::callback)
        .def_prop_ro("user_data", &EvalFilter::user_data)
        .def_prop_ro("asked", &EvalFilter::asked)
        .def("take_error", &EvalFilter::take_error);
}
