// A layer's gate for Python (kernels/cpu.py checks the weights' shapes).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "isa_tables.h"
#include "threads.h"

namespace nb = nanobind;
using namespace engram;

namespace {

template <size_t N> using In = nb::ndarray<const float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <size_t N> using Out = nb::ndarray<float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class A> const float* data(const std::optional<A>& a) { return a ? a->data() : nullptr; }

constexpr int64_t ALONE = 4 << 20;  // products that one thread does sooner than a second one wakes up

void project(const Project& p) {
    const auto run = active_table().project;
    const int64_t each = p.count * p.width > 0 ? p.count * p.width : 1;
    parallel_for(p.outs, ALONE / each + 1, 0, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

// A layer's weights, and its gate step of a few positions. The arrays are the caller's and stay with this object.
class MemoryGate {
public:
    MemoryGate(In<2> key_weight, std::optional<In<1>> key_bias, In<2> value_weight, std::optional<In<1>> value_bias,
               In<2> query_norm, In<2> key_norm, double eps, int kind, std::optional<In<2>> conv_norm,
               std::optional<In<2>> conv_weight, int64_t dilation, double conv_eps)
        : key_weight_(key_weight), value_weight_(value_weight), query_norm_(query_norm), key_norm_(key_norm),
          key_bias_(key_bias), value_bias_(value_bias), conv_norm_(conv_norm), conv_weight_(conv_weight), eps_(eps),
          conv_eps_(conv_eps), kind_(kind), dilation_(dilation) {
        if (conv_weight_ && (conv_weight_->shape(1) > 64 || !conv_norm_))
            throw std::invalid_argument("a convolution of this kind");
    }

    // `out` may be `hidden`.
    void step(const In<4>& hidden, const In<3>& memory, const std::optional<In<3>>& past,
              const std::optional<Mask>& mask, const Out<4>& out, const std::optional<Out<3>>& inputs) const {
        GateStep s = {};
        s.batch = int64_t(hidden.shape(0)), s.length = int64_t(hidden.shape(1));
        s.branches = int64_t(hidden.shape(2)), s.width = int64_t(hidden.shape(3));
        const int64_t positions = s.batch * s.length, E = int64_t(memory.shape(2)), wide = s.branches * s.width;
        if (int64_t(memory.shape(0)) * int64_t(memory.shape(1)) != positions || int64_t(key_weight_.shape(1)) != E ||
            int64_t(key_weight_.shape(0)) != wide || int64_t(value_weight_.shape(0)) != s.width ||
            out.size() != hidden.size() || bool(inputs) != bool(conv_weight_))
            throw std::invalid_argument("arrays that do not fit this gate");
        std::vector<float> key(size_t(positions * wide)), value(size_t(positions * s.width));
        s.hidden = hidden.data(), s.key = key.data(), s.value = value.data();
        s.query_norm = query_norm_.data(), s.key_norm = key_norm_.data();
        s.eps = eps_, s.kind = kind_, s.mask = mask ? mask->data() : nullptr;
        s.taps = conv_weight_ ? int64_t(conv_weight_->shape(1)) : 0, s.dilation = dilation_, s.conv_eps = conv_eps_;
        s.conv_norm = data(conv_norm_), s.conv_weight = data(conv_weight_);
        s.kept = past ? int64_t(past->shape(1)) : 0, s.past = data(past);
        s.out = out.data(), s.inputs = inputs ? inputs->data() : nullptr;
        const Project to_key = {positions, E, wide, memory.data(), key_weight_.data(), data(key_bias_), key.data()};
        const Project to_value = {positions, E, s.width, memory.data(), value_weight_.data(), data(value_bias_),
                                  value.data()};
        nb::gil_scoped_release released;
        project(to_key);
        project(to_value);
        active_table().gate_step(s);
    }

private:
    In<2> key_weight_, value_weight_, query_norm_, key_norm_;
    std::optional<In<1>> key_bias_, value_bias_;
    std::optional<In<2>> conv_norm_, conv_weight_;
    double eps_, conv_eps_;
    int kind_;
    int64_t dilation_;
};

}  // namespace

void bind_gate(nb::module_& m) {
    nb::class_<MemoryGate>(m, "MemoryGate")
        .def(nb::init<In<2>, std::optional<In<1>>, In<2>, std::optional<In<1>>, In<2>, In<2>, double, int,
                      std::optional<In<2>>, std::optional<In<2>>, int64_t, double>(),
             nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none(),
             nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
             nb::arg().noconvert().none(), nb::arg(), nb::arg())
        .def("step", &MemoryGate::step, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(),
             nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none());
}
