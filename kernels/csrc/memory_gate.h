// A layer's weights, and its gate step of a few positions. The arrays are the caller's and stay with this object.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "isa_tables.h"

namespace engram {

namespace nb = nanobind;
template <size_t N> using Singles = nb::ndarray<const float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <size_t N> using SinglesOut = nb::ndarray<float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class A> auto* data_of(const std::optional<A>& a) { return a ? a->data() : nullptr; }

class MemoryGate {
public:
    MemoryGate(Singles<2> key_weight, std::optional<Singles<1>> key_bias, Singles<2> value_weight,
               std::optional<Singles<1>> value_bias, Singles<2> query_norm, Singles<2> key_norm, double eps, int kind,
               std::optional<Singles<2>> conv_norm, std::optional<Singles<2>> conv_weight, int64_t dilation,
               double conv_eps);

    int64_t branches() const { return int64_t(query_norm_.shape(0)); }
    int64_t width() const { return int64_t(query_norm_.shape(1)); }
    // Whether these fit; positions are memory's first two axes.
    bool fits(const Singles<3>& memory, const std::optional<Singles<3>>& past, bool inputs) const;
    // hidden and out [B, T, M, D], the same or apart; Python's lock is not needed.
    void run(const float* hidden, const Singles<3>& memory, const std::optional<Singles<3>>& past, const bool* mask,
             float* out, float* inputs) const;

private:
    Singles<2> key_weight_, value_weight_, query_norm_, key_norm_;
    std::optional<Singles<1>> key_bias_, value_bias_;
    std::optional<Singles<2>> conv_norm_, conv_weight_;
    double eps_, conv_eps_;
    int kind_;
    int64_t dilation_;
};

}  // namespace engram
