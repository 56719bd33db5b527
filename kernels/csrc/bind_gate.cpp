// The gate step for Python (kernels/cpu.py checks the shapes).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "isa_tables.h"

namespace nb = nanobind;
using namespace engram;

namespace {

template <size_t N> using In = nb::ndarray<const float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <size_t N> using Out = nb::ndarray<float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class A> const float* data(const std::optional<A>& a) { return a ? a->data() : nullptr; }

void step(const In<4>& hidden, const In<4>& key, const In<3>& value, const In<2>& query_norm, const In<2>& key_norm,
          double eps, int kind, const std::optional<Mask>& mask, const std::optional<In<2>>& conv_norm,
          const std::optional<In<2>>& conv_weight, int64_t dilation, double conv_eps,
          const std::optional<In<3>>& past, const Out<4>& out, const std::optional<Out<3>>& inputs) {
    GateStep s = {};
    s.batch = int64_t(hidden.shape(0)), s.length = int64_t(hidden.shape(1));
    s.branches = int64_t(hidden.shape(2)), s.width = int64_t(hidden.shape(3));
    s.hidden = hidden.data(), s.key = key.data(), s.value = value.data();
    s.query_norm = query_norm.data(), s.key_norm = key_norm.data();
    s.eps = eps, s.kind = kind, s.mask = mask ? mask->data() : nullptr;
    s.taps = conv_weight ? int64_t(conv_weight->shape(1)) : 0, s.dilation = dilation, s.conv_eps = conv_eps;
    s.conv_norm = data(conv_norm), s.conv_weight = data(conv_weight);
    s.kept = past ? int64_t(past->shape(1)) : 0, s.past = data(past);
    s.out = out.data(), s.inputs = inputs ? inputs->data() : nullptr;
    if (s.taps > 64 || (s.taps && (!s.inputs || !s.conv_norm))) throw std::invalid_argument("a convolution of this kind");
    nb::gil_scoped_release released;
    active_table().gate_step(s);
}

}  // namespace

void bind_gate(nb::module_& m) {
    m.def("gate_step", &step, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
          nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
          nb::arg().noconvert().none(), nb::arg().noconvert().none(), nb::arg(), nb::arg(),
          nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none());
}
