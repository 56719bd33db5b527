// Rows of files, for Python (quantize/mapped.py). Outcomes are values here and become words there.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

#include "pages.h"
#include "rows.h"

namespace nb = nanobind;
using namespace engram;

namespace {

using FileArgs = std::pair<int, uint64_t>;                                // descriptor, size
using RunArgs = std::tuple<int, uint64_t, uint64_t, uint64_t>;            // file, first block, blocks, first checksum
using SegmentArgs = std::tuple<uint64_t, uint64_t, int, uint64_t, uint64_t, uint32_t, uint32_t>;  // as Segment
using SumsArgs = std::tuple<int, uint64_t, uint64_t>;                     // file, offset, count

struct Buffer {  // a Python object's memory, let go when the call ends
    Py_buffer view;
    Buffer(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view, flags)) throw nb::python_error();
    }
    ~Buffer() { PyBuffer_Release(&view); }
    char kind() const { return view.format ? view.format[std::strspn(view.format, "@=<")] : 'B'; }
};

Places places_of(const std::vector<FileArgs>& files, const std::vector<RunArgs>& runs,
                 const std::vector<std::vector<SegmentArgs>>& parts, uint64_t rows, const SumsArgs& sums) {
    Places places;
    for (const auto& [fd, bytes] : files) {
        const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (own < 0) {
            for (const File& file : places.files) close(file.fd);
            throw std::runtime_error(std::string("dup: ") + std::strerror(errno));
        }
        places.files.push_back({own, bytes});
    }
    for (const auto& [file, first, blocks, sum] : runs) places.runs.push_back({file, first, blocks, sum, 0});
    for (const auto& part : parts) {
        places.parts.emplace_back();
        for (const auto& [first_row, count, run, offset, pitch, per_page, bytes] : part)
            places.parts.back().push_back({first_row, count, run, offset, pitch, per_page, bytes, 0, 0});
    }
    places.rows = rows;
    std::tie(places.sums_file, places.sums_offset, places.sums) = sums;
    return places;
}

std::shared_ptr<PageReader> open_reader(const std::string& way, const std::vector<FileArgs>& files,
                                        const std::vector<RunArgs>& runs,
                                        const std::vector<std::vector<SegmentArgs>>& parts, uint64_t rows,
                                        const SumsArgs& sums, bool verify) {
    auto* make = way == "mmap" ? make_mmap_reader : way == "pread" ? make_pread_reader : nullptr;
#ifdef __linux__
    if (way == "uring") make = make_uring_reader;
#endif
    if (!make) throw nb::value_error("this build has no such way to read pages");
    return make(places_of(files, runs, parts, rows, sums), verify);
}

nb::object ask(PageReader& reader, nb::handle rows) {
    Buffer ids(rows, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
    if (ids.view.itemsize != 8 || !std::strchr("lq", ids.kind())) throw nb::value_error("row ids must be int64");
    auto ticket = std::make_shared<Ticket>();
    int64_t bad;
    {
        nb::gil_scoped_release release;
        bad = reader.ask(static_cast<const int64_t*>(ids.view.buf), ids.view.len / 8, ticket);
    }
    return bad >= 0 ? nb::cast(bad) : nb::cast(ticket);
}

nb::object told(const Outcome& outcome) {
    static const char* const kinds[] = {"ok", "damaged", "resized", "fault", "unreadable", "unsteady", "rewritten"};
    if (outcome.kind == Outcome::ok) return nb::none();
    return nb::make_tuple(kinds[outcome.kind], outcome.file, outcome.number);
}

nb::object run(PageReader& reader, Ticket& ticket, Sink sink, int64_t each, int64_t bytes, int64_t begin, int64_t end) {
    if (end < 0) end = ticket.n;
    if (ticket.reader.get() != &reader) throw nb::value_error("the ticket is another table's");
    if (begin > end || end > ticket.n || begin < 0) throw nb::value_error("the piece is not one of the ticket's rows");
    if (bytes != each * ticket.n) throw nb::value_error("out does not hold the rows that were asked for");
    if (begin == end) return nb::none();
    sink.out += begin * each;
    Outcome outcome;
    {
        nb::gil_scoped_release release;
        outcome = reader.take(ticket, begin, end, sink);
    }
    return told(outcome);
}

nb::object take(PageReader& reader, Ticket& ticket, nb::handle out, int code, float factor, int64_t width, int threads,
                int64_t begin, int64_t end) {
    Buffer to(out, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE);
    const bool bf16 = to.kind() == 'H' && to.view.itemsize == 2;
    if (!bf16 && !(to.kind() == 'f' && to.view.itemsize == 4)) throw nb::value_error("out must be float32 or uint16");
    if (row_bytes(code, width) != reader.row_bytes()) throw nb::value_error("the codec's rows are not the table's");
    Sink sink{static_cast<uint8_t*>(to.view.buf), {code, factor}, width, bf16, threads};
    return run(reader, ticket, sink, width * (bf16 ? 2 : 4), to.view.len, begin, end);
}

nb::object copy(PageReader& reader, Ticket& ticket, nb::handle out, int threads, int64_t begin, int64_t end) {
    Buffer to(out, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE);
    Sink sink{static_cast<uint8_t*>(to.view.buf), {}, 0, false, threads};
    return run(reader, ticket, sink, reader.row_bytes(), to.view.len, begin, end);
}

}  // namespace

void bind_pages(nb::module_& m) {
    nb::class_<Ticket>(m, "PageTicket").def_prop_ro("done", [](Ticket& t) { return t.state == Ticket::done; });
    nb::class_<PageReader>(m, "PageReader")
        .def("ask", ask)
        .def("take", take)
        .def("copy", copy)
        .def("pieces", &PageReader::pieces)
        .def("trim", &PageReader::trim, nb::call_guard<nb::gil_scoped_release>())
        .def("mark_verified", &PageReader::mark_verified)
        .def("withdraw", [](PageReader& r) { withdraw(r); }, nb::call_guard<nb::gil_scoped_release>())
        .def("set_bounded", &PageReader::set_bounded)
        .def_prop_ro("blocks_asked", [](PageReader& r) { return r.blocks_asked.load(); });
    m.def("open_pages", open_reader);
    m.attr("PAGE_WAYS") = nb::make_tuple("mmap",
#ifdef __linux__
                                         "uring",
#endif
                                         "pread");
}
