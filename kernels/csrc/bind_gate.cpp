// A layer's gate for Python (kernels/cpu.py checks the weights' shapes).
#include "memory_gate.h"
#include "threads.h"

namespace engram {
namespace {

constexpr int64_t ALONE = 4 << 20;  // products that one thread does sooner than a second one wakes up

void project(const Project& p) {
    const auto run = active_table().project;
    const int64_t each = p.count * p.width > 0 ? p.count * p.width : 1;
    parallel_for(p.outs, ALONE / each + 1, 0, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

}  // namespace

MemoryGate::MemoryGate(Singles<2> key_weight, std::optional<Singles<1>> key_bias, Singles<2> value_weight,
                       std::optional<Singles<1>> value_bias, Singles<2> query_norm, Singles<2> key_norm, double eps,
                       int kind, std::optional<Singles<2>> conv_norm, std::optional<Singles<2>> conv_weight,
                       int64_t dilation, double conv_eps)
    : key_weight_(key_weight), value_weight_(value_weight), query_norm_(query_norm), key_norm_(key_norm),
      key_bias_(key_bias), value_bias_(value_bias), conv_norm_(conv_norm), conv_weight_(conv_weight), eps_(eps),
      conv_eps_(conv_eps), kind_(kind), dilation_(dilation) {
    if (conv_weight_ && (conv_weight_->shape(1) > 64 || !conv_norm_))
        throw std::invalid_argument("a convolution of this kind");
}

bool MemoryGate::fits(const Singles<3>& memory, const std::optional<Singles<3>>& past, bool inputs) const {
    const bool behind = !past || (past->shape(0) == memory.shape(0) && int64_t(past->shape(2)) == branches() * width());
    return memory.shape(2) == key_weight_.shape(1) && memory.shape(2) == value_weight_.shape(1) &&
           int64_t(key_weight_.shape(0)) == branches() * width() && int64_t(value_weight_.shape(0)) == width() &&
           behind && inputs == bool(conv_weight_);
}

void MemoryGate::run(const float* hidden, const Singles<3>& memory, const std::optional<Singles<3>>& past,
                     const bool* mask, float* out, float* inputs) const {
    GateStep s = {};
    s.batch = int64_t(memory.shape(0)), s.length = int64_t(memory.shape(1));
    s.branches = branches(), s.width = width();
    const int64_t positions = s.batch * s.length, E = int64_t(memory.shape(2)), wide = s.branches * s.width;
    std::vector<float> key(size_t(positions * wide)), value(size_t(positions * s.width));
    s.hidden = hidden, s.key = key.data(), s.value = value.data();
    s.query_norm = query_norm_.data(), s.key_norm = key_norm_.data();
    s.eps = eps_, s.kind = kind_, s.mask = mask;
    s.taps = conv_weight_ ? int64_t(conv_weight_->shape(1)) : 0, s.dilation = dilation_, s.conv_eps = conv_eps_;
    s.conv_norm = data_of(conv_norm_), s.conv_weight = data_of(conv_weight_);
    s.kept = past ? int64_t(past->shape(1)) : 0, s.past = data_of(past);
    s.out = out, s.inputs = inputs;
    project({positions, E, wide, memory.data(), key_weight_.data(), data_of(key_bias_), key.data()});
    project({positions, E, s.width, memory.data(), value_weight_.data(), data_of(value_bias_), value.data()});
    active_table().gate_step(s);
}

namespace {

// `out` may be `hidden`.
void step(const MemoryGate& gate, const Singles<4>& hidden, const Singles<3>& memory,
          const std::optional<Singles<3>>& past, const std::optional<Flags>& mask, const SinglesOut<4>& out,
          const std::optional<SinglesOut<3>>& inputs) {
    const auto same = [&](const auto& a) {
        return a.shape(0) == memory.shape(0) && a.shape(1) == memory.shape(1) &&
               int64_t(a.shape(2)) == gate.branches() && int64_t(a.shape(3)) == gate.width();
    };
    if (!gate.fits(memory, past, bool(inputs)) || !same(hidden) || !same(out) ||
        (inputs && int64_t(inputs->size()) != int64_t(hidden.size())) ||
        (mask && (mask->shape(0) != memory.shape(0) || mask->shape(1) != memory.shape(1))))
        throw std::invalid_argument("arrays that do not fit this gate");
    nb::gil_scoped_release released;
    gate.run(hidden.data(), memory, past, data_of(mask), out.data(), data_of(inputs));
}

}  // namespace
}  // namespace engram

void bind_gate(nanobind::module_& m) {
    using namespace engram;
    nb::class_<MemoryGate>(m, "MemoryGate")
        .def(nb::init<Singles<2>, std::optional<Singles<1>>, Singles<2>, std::optional<Singles<1>>, Singles<2>,
                      Singles<2>, double, int, std::optional<Singles<2>>, std::optional<Singles<2>>, int64_t, double>(),
             nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none(),
             nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg().noconvert().none(),
             nb::arg().noconvert().none(), nb::arg(), nb::arg())
        .def("step", &step, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert().none(),
             nb::arg().noconvert().none(), nb::arg().noconvert(), nb::arg().noconvert().none());
}
