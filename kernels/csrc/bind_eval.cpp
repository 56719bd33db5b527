// The filter of llama.cpp's evaluation callback: of a graph's nodes only those with a wanted name enter Python.
// A gate that was armed for a node runs here, without Python.
// The callback is `bool (ggml_tensor*, bool ask, void* user)`: asked first whether a node is wanted, called again when
// it was computed. `false` then would end the graph silently: what goes wrong is kept for the caller instead.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory_gate.h"

namespace nb = nanobind;

namespace {

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

using engram::MemoryGate;
using engram::Singles;
using engram::SinglesOut;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

class EvalFilter {
public:
    EvalFilter(std::vector<std::string> names, int64_t width, nb::object hit)
        : names_(std::move(names)), width_(width), hit_(std::move(hit)) {
        for (const std::string& name : names_)
            if (name.empty() || name.size() >= sizeof(GgmlTensor::name)) throw std::invalid_argument("a name of a node");
        if (names_.empty()) throw std::invalid_argument("names of nodes");
    }

    // Token ids of the batch that comes next; nothing is armed.
    void expect(Ids ids) {
        ids_ = std::move(ids);
        armed_.clear();
        armed_.resize(names_.size());
        handled_.assign(names_.size(), 0);
    }
    // When this node comes, one micro-batch with a row for each position of the memory, let the gate rewrite it.
    void arm(size_t place, nb::object gate, Singles<3> memory, std::optional<Singles<3>> past,
             std::optional<SinglesOut<3>> inputs) {
        const MemoryGate* found = nb::cast<const MemoryGate*>(gate);
        if (place == 0 || place >= armed_.size() || !found || found->branches() != 1 || found->width() != width_ ||
            !found->fits(memory, past, bool(inputs)) ||
            (inputs && (inputs->shape(0) != memory.shape(0) || inputs->shape(1) != memory.shape(1) ||
                        int64_t(inputs->shape(2)) != width_)))
            throw std::invalid_argument("a gate or arrays that do not fit this node");
        armed_[place] = Armed{std::move(gate), found, std::move(memory), std::move(past), std::move(inputs)};
    }
    // Rows of a node that were dealt with here: token ids compared, or rewritten by a gate.
    int64_t handled(size_t place) const { return place < handled_.size() ? handled_[place] : 0; }

    uintptr_t callback() const { return reinterpret_cast<uintptr_t>(&EvalFilter::called); }
    uintptr_t user_data() const { return reinterpret_cast<uintptr_t>(this); }
    int64_t asked() const { return asked_; }
    bool handled_all(int64_t rows) const {
        for (int64_t n : handled_)
            if (n != rows) return false;
        return !handled_.empty();
    }

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

    // Place of a tensor's name, or -1; most names differ in the first letters.
    int find(const GgmlTensor* tensor) const {
        for (size_t i = 0; i < names_.size(); ++i) {
            const std::string& wanted = names_[i];
            if (tensor->name[0] == wanted[0] && !memcmp(tensor->name, wanted.c_str(), wanted.size() + 1)) return int(i);
        }
        return -1;
    }

    bool evaluate(void* tensor, bool ask) {
        if (ask) ++asked_;
        const auto* found = static_cast<const GgmlTensor*>(tensor);
        const int place = find(found);
        if (ask && place == 0 && ids_.is_valid() && ids_.size() == 1) {  // one token has no order: its node need not end
            handled_[0] = 1;
            return false;
        }
        if (ask) return place >= 0;
        if (place < 0) return true;
        if (place == 0 && match(found->src[1])) return true;
        const bool plain = found->type == F32 && found->ne[0] == width_ && found->ne[2] == 1 && found->ne[3] == 1 &&
                           found->nb[0] == 4 && found->nb[1] == 4 * size_t(width_);
        if (place && plain && fire(size_t(place), *found)) return true;
        nb::gil_scoped_acquire held;
        if (error_.is_valid()) return true;  // the first one counts
        try {
            nb::object rows = nb::none();
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
        if (ids->ne[1] != 1 || ids->ne[2] != 1 || ids->ne[3] != 1 || handled_[0] + count > int64_t(ids_.size()) ||
            memcmp(ids->data, ids_.data() + handled_[0], size_t(count) * 4))
            return false;
        handled_[0] += count;
        return true;
    }
    bool fire(size_t place, const GgmlTensor& found) {
        if (place >= armed_.size() || !armed_[place] || handled_[place]) return false;
        const Armed& a = *armed_[place];
        if (found.ne[1] != int64_t(a.memory.shape(0) * a.memory.shape(1))) return false;
        auto* rows = static_cast<float*>(found.data);
        a.gate->run(rows, a.memory, a.past, nullptr, rows, a.inputs ? a.inputs->data() : nullptr);
        handled_[place] = found.ne[1];
        return true;
    }

    std::vector<std::string> names_;
    int64_t width_;
    nb::object hit_, error_;
    struct Armed {
        nb::object kept;
        const MemoryGate* gate;
        Singles<3> memory;
        std::optional<Singles<3>> past;
        std::optional<SinglesOut<3>> inputs;
    };
    Ids ids_;
    std::vector<std::optional<Armed>> armed_;  // by place
    std::vector<int64_t> handled_;
    int64_t asked_ = 0;
};

}  // namespace

void bind_eval(nb::module_& m) {
    nb::class_<EvalFilter>(m, "EvalFilter")
        .def(nb::init<std::vector<std::string>, int64_t, nb::object>())
        .def_prop_ro("callback", &EvalFilter::callback)
        .def_prop_ro("user_data", &EvalFilter::user_data)
        .def_prop_ro("asked", &EvalFilter::asked)
        .def("handled", &EvalFilter::handled)
        .def("handled_all", &EvalFilter::handled_all)
        .def("arm", &EvalFilter::arm, nb::arg(), nb::arg(), nb::arg().noconvert(), nb::arg().noconvert().none(),
             nb::arg().noconvert().none())
        .def("expect", &EvalFilter::expect, nb::arg().noconvert())
        .def("take_error", &EvalFilter::take_error);
}
