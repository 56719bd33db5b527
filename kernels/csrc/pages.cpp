#include "pages.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <sys/mman.h>
#include <unistd.h>

#include "guard.h"
#include "rows.h"
#include "threads.h"

namespace engram {
namespace {

constexpr int64_t kGrain = 1024;  // rows a thread takes at least

inline uint64_t high_half(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline uint64_t address_of(const Segment& s, uint64_t row) {
    const uint64_t local = row - s.first_row;
    const uint64_t page = s.per_page == 1 ? local : high_half(local, s.magic);
    return s.address + page * s.pitch + (local - page * s.per_page) * s.bytes;
}

const Segment& segment_of(const std::vector<Segment>& part, uint64_t row) {
    return *(std::upper_bound(part.begin(), part.end(), row,
                              [](uint64_t r, const Segment& s) { return r < s.first_row; }) - 1);
}

inline bool has(const std::atomic<uint64_t>* marks, uint64_t v) {
    return marks[v >> 6].load(std::memory_order_relaxed) >> (v & 63) & 1;
}

Stamp stamp_of(const struct stat& now) {
#ifdef __APPLE__
    const timespec &m = now.st_mtimespec, &c = now.st_ctimespec;
#else
    const timespec &m = now.st_mtim, &c = now.st_ctim;
#endif
    return {m.tv_sec * 1000000000LL + m.tv_nsec, c.tv_sec * 1000000000LL + c.tv_nsec};
}

}  // namespace

PageReader::PageReader(Places places, bool verify) : places_(std::move(places)), verify_(verify) {
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uint64_t ratio = page / kBlock ? page / kBlock : 1;
    for (Run& run : places_.runs) {  // on a page of memory of its own, as far into it as into the file's page
        run.v = (v_blocks_ + ratio - 1) / ratio * ratio + run.first % ratio;
        v_blocks_ = run.v + run.blocks;
    }
    for (auto& part : places_.parts) {
        row_bytes_ += part.front().bytes;
        for (Segment& s : part) {
            const Run& run = places_.runs[s.run];
            s.address = run.v * kBlock + (s.offset - run.first * kBlock);
            s.magic = ~uint64_t{0} / s.per_page + 1;
        }
    }
    for (const File& file : places_.files) {
        struct stat now = {};
        fstat(file.fd, &now);
        stamps_.push_back(stamp_of(now));
    }
    if (verify_) {
        const uint64_t begin = places_.sums_offset / page * page;
        sums_map_bytes_ = places_.sums_offset - begin + 4 * places_.sums;
        sums_map_ = mmap(nullptr, sums_map_bytes_, PROT_READ, MAP_SHARED, places_.files[places_.sums_file].fd,
                         static_cast<off_t>(begin));
        if (sums_map_ == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + std::strerror(errno));
        sums_ = static_cast<const uint8_t*>(sums_map_) + (places_.sums_offset - begin);
        if (!sums_crc(sums_crc_)) throw std::runtime_error("the checksums cannot be read");
        madvise(sums_map_, sums_map_bytes_, MADV_DONTNEED);
    }
}

void PageReader::trim() {
    if (sums_) madvise(sums_map_, sums_map_bytes_, MADV_DONTNEED);
}

PageReader::~PageReader() {
    if (sums_) munmap(sums_map_, sums_map_bytes_);
    for (const File& file : places_.files) close(file.fd);
}

template <bool kMarks>
int64_t PageReader::note(const int64_t* rows, int64_t n, Ticket& ticket) {
    uint64_t* address = ticket.address.get();
    const uint64_t origin = origin_, total = places_.rows;
    for (const auto& part : places_.parts) {
        const Segment* s = part.data();
        const bool one = part.size() == 1;
        for (int64_t i = 0; i < n; i++) {
            const uint64_t row = static_cast<uint64_t>(rows[i]);
            if (row >= total) return i;
            if (!one && (row < s->first_row || row - s->first_row >= s->rows)) s = &segment_of(part, row);
            const uint64_t at = address_of(*s, row);
            address[i] = origin + at;
            if (!kMarks) continue;
            for (uint64_t v = at / kBlock; v <= (at + s->bytes - 1) / kBlock; v++) {
                if (!has(asked_.get(), v)) {
                    const uint64_t bit = uint64_t{1} << (v & 63);
                    if (!(asked_[v >> 6].fetch_or(bit, std::memory_order_relaxed) & bit)) ticket.wanted.push_back(v);
                }
                if (verify_ && !has(verified_.get(), v)) ticket.unverified.push_back(v);
            }
        }
        address += n;
    }
    return -1;
}

int64_t PageReader::ask(const int64_t* rows, int64_t n, const std::shared_ptr<Ticket>& ticket) {
    ticket->reader = shared_from_this();
    ticket->n = n;
    ticket->address.reset(new uint64_t[n * places_.parts.size()]);
    ticket->generation = generation_.load(std::memory_order_acquire);
    const int64_t bad = asked_ ? note<true>(rows, n, *ticket) : note<false>(rows, n, *ticket);
    if (bad >= 0) {  // nothing is read for a ticket that nobody gets
        for (uint64_t v : ticket->wanted)
            asked_[v >> 6].fetch_and(~(uint64_t{1} << (v & 63)), std::memory_order_relaxed);
        return bad;
    }
    if (!ticket->unverified.empty()) ticket->generation = 0;
    if (n) start(ticket);
    return -1;
}

void PageReader::make_rows(const uint8_t* const* address, int64_t n, int64_t apart, const Sink& sink,
                           std::atomic<const void*>& fault) const {
    const int64_t parts = static_cast<int64_t>(places_.parts.size());
    const int64_t each = sink.codec.code < 0 ? row_bytes_ : sink.width * (sink.bf16 ? 2 : 4);
    const auto emit = [&](const uint8_t* const* from, int64_t count, int64_t first) {
        if (sink.codec.code < 0) copy_rows(row_bytes_, from, count, sink.out + first * each);
        else decode_rows(sink.codec, sink.width, from, count, sink.out + first * each, sink.bf16);
    };
    const auto piece = [&](int64_t begin, int64_t end) {
        const void* at = guarded([&] {
            if (parts == 1) return emit(address + begin, end - begin, begin);
            // Parts are put side by side first: a codec sees a row in one piece.
            constexpr int64_t kStage = 64;
            uint8_t stage[kStage * kBlock / 16];
            const uint8_t* whole[kStage];
            const int64_t most = std::min<int64_t>(kStage, static_cast<int64_t>(sizeof stage) / row_bytes_);
            for (int64_t i = begin; i < end; i += most) {
                const int64_t count = std::min(most, end - i);
                for (int64_t k = 0; k < count; k++) {
                    uint8_t* to = stage + k * row_bytes_;
                    whole[k] = to;
                    for (int64_t p = 0; p < parts; p++) {
                        const uint32_t bytes = places_.parts[p].front().bytes;
                        std::memcpy(to, address[p * apart + i + k], bytes);
                        to += bytes;
                    }
                }
                emit(whole, count, i);
            }
        });
        if (at) fault = at;
    };
    if (sink.threads != 1 && n > 2 * kGrain) parallel_for(n, kGrain, sink.threads, piece);
    else piece(0, n);
}

std::vector<int64_t> PageReader::pieces(const Ticket& ticket, int64_t folios) const {
    constexpr uint64_t kFolio = uint64_t{1} << 21;
    const uint64_t* address = ticket.address.get();
    std::vector<int64_t> edges{0};
    int64_t changes = 0;
    const int64_t parts = static_cast<int64_t>(places_.parts.size());
    for (int64_t i = 1; i < ticket.n; i++) {
        for (int64_t p = 0; p < parts; p++)
            changes += address[p * ticket.n + i] / kFolio != address[p * ticket.n + i - 1] / kFolio;
        if (changes >= folios) {
            edges.push_back(i);
            changes = 0;
        }
    }
    edges.push_back(ticket.n);
    return edges;
}

const Run& PageReader::run_of(uint64_t v) const {
    return *(std::upper_bound(places_.runs.begin(), places_.runs.end(), v,
                              [](uint64_t x, const Run& run) { return x < run.v; }) - 1);
}

uint64_t PageReader::length_of(const Run& run, uint64_t v) const {
    return std::min(kBlock, places_.files[run.file].bytes - (run.first + (v - run.v)) * kBlock);
}

uint32_t PageReader::sum_of(const Run& run, uint64_t v) const {
    const uint8_t* at = sums_ + 4 * (run.sum + (v - run.v));
    return at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
}

bool PageReader::sums_crc(uint32_t& crc) const {
    arm_guard();
    return !guarded([&] { crc = crc32(sums_, 4 * places_.sums); });
}

Outcome PageReader::unchanged(uint64_t generation) {
    Outcome outcome;
    std::lock_guard<ForkMutex> hold(changing_);
    bool changed = false;
    for (size_t i = 0; i < stamps_.size() && outcome.kind == Outcome::ok; i++) {
        struct stat now;
        outcome.file = static_cast<int>(i);
        if (fstat(places_.files[i].fd, &now)) {
            outcome.kind = Outcome::unreadable;
            outcome.number = static_cast<uint64_t>(errno);
            break;
        }
        if (static_cast<uint64_t>(now.st_size) != places_.files[i].bytes) {
            outcome.kind = Outcome::resized;
            outcome.number = static_cast<uint64_t>(now.st_size);
        }
        const Stamp stamp = stamp_of(now);
        changed |= stamp != stamps_[i];
        stamps_[i] = stamp;
    }
    if (changed) {
        // First the marks, then the generation: who sees the new number sees no old mark.
        clear_marks();
        generation_.fetch_add(1, std::memory_order_release);
        uint32_t crc = sums_crc_;
        sums_are_ours_ = !verify_ || (sums_crc(crc) && crc == sums_crc_);
    }
    if (outcome.kind != Outcome::ok) return outcome;
    outcome.file = places_.sums_file;
    if (!sums_are_ours_) outcome.kind = Outcome::rewritten;
    else if (generation != generation_) outcome.kind = Outcome::unsteady;
    return outcome;
}

}  // namespace engram
