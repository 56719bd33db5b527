// The extension engram.kernels._C; kernels/_C.pyi says what it holds.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_rows(nb::module_& m);   // bind_rows.cpp: gather, decode, copy, instruction sets
void bind_pages(nb::module_& m);  // bind_pages.cpp: rows of files
void bind_ops(nb::module_& m);    // bind_ops.cpp: hash, scatter-add, checksums
void bind_gate(nb::module_& m);   // bind_gate.cpp: the gate step of decoding
void bind_encode(nb::module_& m); // bind_encode.cpp: encoding, and what it lost
void bind_split(nb::module_& m);  // bind_split.cpp: classes of rows
void bind_eval(nb::module_& m);   // bind_eval.cpp: llama.cpp's evaluation callback

NB_MODULE(_C, m) {
    bind_rows(m);
    bind_pages(m);
    bind_ops(m);
    bind_gate(m);
    bind_encode(m);
    bind_split(m);
    bind_eval(m);
}
