// The files mapped into memory in one line; a bitmap remembers which blocks the kernel was asked to read, another which
// were compared with their checksum. Warm, a row costs two bit tests and a copy.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include "fork.h"
#include "guard.h"
#include "pages.h"
#include "rows.h"

namespace engram {
namespace {

using Marks = std::unique_ptr<std::atomic<uint64_t>[]>;
using Ranges = std::vector<iovec>;

constexpr size_t kBatch = 512;             // ranges asked for in one call; the kernel takes up to 1024
constexpr int64_t kMany = 1024;            // rows from which verifying beside the asking pays
constexpr uint64_t kSumsAtOnce = 1 << 24;  // checksums up to this size are read in one go, larger ones by the page

void advise(const iovec& range) { madvise(range.iov_base, range.iov_len, MADV_WILLNEED); }

// Ask the kernel to read ranges of memory; it blocks as long as the device's queue is full. Nothing depends on it: a
// page that was not read is read when it is touched. `asked` is told the number of ranges after every batch.
template <class Told>
void will_need(const Ranges& ranges, Told asked) {
    size_t done = 0;
#if defined(__linux__) && defined(SYS_process_madvise) && defined(SYS_pidfd_open)
    const long self = ranges.size() > 1 ? syscall(SYS_pidfd_open, getpid(), 0) : -1;
    while (self >= 0 && done < ranges.size()) {
        const size_t count = std::min(kBatch, ranges.size() - done);
        ssize_t bytes = syscall(SYS_process_madvise, self, ranges.data() + done, count, MADV_WILLNEED, 0U);
        if (bytes <= 0) break;
        const size_t before = done;
        while (done < before + count && bytes >= static_cast<ssize_t>(ranges[done].iov_len))
            bytes -= static_cast<ssize_t>(ranges[done++].iov_len);
        if (done == before) break;
        asked(done);
    }
    if (self >= 0) close(static_cast<int>(self));
#endif
    for (; done < ranges.size(); done++) advise(ranges[done]);
}

Marks no_marks(uint64_t count) { return Marks(new std::atomic<uint64_t>[count / 64 + 1]()); }

void clear(Marks& marks, uint64_t count) {
    for (uint64_t i = 0; i <= count / 64; i++) marks[i].store(0, std::memory_order_relaxed);
}

void sort_unique(std::vector<uint64_t>& numbers) {
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
}

class MmapReader : public PageReader {
  public:
    MmapReader(Places places, bool verify) : PageReader(std::move(places), verify) {
        page_ = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
        bytes_ = (v_blocks_ * kBlock + page_ - 1) / page_ * page_;
        void* line = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (line == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + std::strerror(errno));
        line_ = static_cast<uint8_t*>(line);
        origin_ = reinterpret_cast<uint64_t>(line);
        for (const Run& run : places_.runs) {
            const uint64_t before = run.first * kBlock % page_;  // of the file's page, before the run
            void* want = line_ + run.v * kBlock - before;
            const void* got = mmap(want, run.blocks * kBlock + before, PROT_READ, MAP_SHARED | MAP_FIXED,
                                   places_.files[run.file].fd, static_cast<off_t>(run.first * kBlock - before));
            if (got == MAP_FAILED) {
                const std::string why = std::strerror(errno);
                munmap(line_, bytes_);
                throw std::runtime_error("mmap: " + why);
            }
        }
        madvise(line_, bytes_, MADV_RANDOM);  // a row alone is wanted, not what lies around it
#ifdef MADV_NOHUGEPAGE
        madvise(line_, bytes_, MADV_NOHUGEPAGE);
#endif
        asked_ = no_marks(v_blocks_);
        if (verify_) {
            verified_ = no_marks(v_blocks_);
            sum_pages_asked_ = no_marks(places_.sums * 4 / page_ + 1);
        }
    }

    ~MmapReader() override { munmap(line_, bytes_); }

    void start(const std::shared_ptr<Ticket>& ticket) override {
        if (!ticket->wanted.empty() || (!ticket->unverified.empty() && !bounded_)) enqueue(ticket);
    }

    void ask_device(Ticket& ticket) override {
        if (ticket.wanted.empty()) return;
        sort_unique(ticket.wanted);
        Ranges ranges;
        if (verify_) want_sums(ticket.wanted, ranges);
        for (uint64_t v : ticket.wanted) add(ranges, line_ + v * kBlock, kBlock);
        // What was asked for two batches ago has mostly arrived.
        uint64_t last = 0;
        will_need(ranges, [&](size_t done) {
            ticket.settled.store(last, std::memory_order_release);
            const uint64_t end = reinterpret_cast<uint64_t>(ranges[done - 1].iov_base) + ranges[done - 1].iov_len;
            last = end > origin_ && end <= origin_ + bytes_ ? (end - origin_) / kBlock : 0;
        });
        blocks_asked += ticket.wanted.size();
    }

    bool wants_await() const override { return !bounded_; }

    void await_device(Ticket& ticket) override {
        arm_guard();
        if (!verify_) {
            for (uint64_t v : ticket.wanted) guarded([&] { (void)*const_cast<const volatile uint8_t*>(line_ + v * kBlock); });
            return;
        }
        if (ticket.unverified.empty()) return;
        const uint64_t generation = generation_.load(std::memory_order_acquire);
        // What is wrong is found again and reported by take().
        if (verify_blocks(ticket.unverified, generation).kind == Outcome::ok) ticket.generation = generation;
    }

    Outcome take(Ticket& ticket, int64_t begin, int64_t end, const Sink& sink) override {
        arm_guard();
        if (verify_ && !bounded_ && end - begin >= kMany) verify_behind(ticket, begin, end);
        finish(ticket);
        const auto* address = reinterpret_cast<const uint8_t* const*>(ticket.address.get());
        Outcome outcome;
        for (int attempt = 0; attempt < kAttempts; attempt++) {
            const uint64_t generation = generation_.load(std::memory_order_acquire);
            outcome = {};
            if (verify_ && ticket.generation != generation) {
                outcome = verify_rows(ticket, begin, end, generation);
                if (outcome.kind == Outcome::ok && begin == 0 && end == ticket.n) ticket.generation = generation;
            }
            if (outcome.kind == Outcome::ok) {
                std::atomic<const void*> fault{nullptr};
                make_rows(address + begin, end - begin, ticket.n, sink, fault);
                if (fault) outcome = fault_at(fault);
            }
            // A file that is as it was when its blocks were verified was so throughout the copy.
            const Outcome files = unchanged(generation);
            if (files.kind == Outcome::ok) return outcome;
            if (files.kind != Outcome::unsteady) return files;
            if (outcome.kind == Outcome::ok) outcome = files;
        }
        return outcome;
    }

    void trim() override {
        PageReader::trim();
        madvise(line_, bytes_, MADV_DONTNEED);
        clear(asked_, v_blocks_);
    }

    void clear_marks() override {
        if (verify_) clear(verified_, v_blocks_);
    }

    void set_bounded(bool bounded) override { bounded_ = bounded; }

    void mark_verified() override {
        if (!verify_ || unchanged(1).kind != Outcome::ok) return;
        std::lock_guard<ForkMutex> hold(changing_);
        for (uint64_t i = 0; i <= v_blocks_ / 64 && generation_ == 1; i++) verified_[i] = ~uint64_t{0};
    }

  private:
    void add(Ranges& ranges, const uint8_t* at, uint64_t bytes) {
        const uint64_t begin = reinterpret_cast<uint64_t>(at) / page_ * page_;
        const uint64_t end = (reinterpret_cast<uint64_t>(at) + bytes + page_ - 1) / page_ * page_;
        if (!ranges.empty()) {
            iovec& last = ranges.back();
            const uint64_t last_end = reinterpret_cast<uint64_t>(last.iov_base) + last.iov_len;
            if (begin <= last_end && begin >= reinterpret_cast<uint64_t>(last.iov_base)) {
                last.iov_len += end > last_end ? end - last_end : 0;
                return;
            }
        }
        ranges.push_back({reinterpret_cast<void*>(begin), end - begin});
    }

    // Checksums of the blocks that are not in memory yet would be read one after another while they are compared.
    void want_sums(const std::vector<uint64_t>& blocks, Ranges& ranges) {
        if (places_.sums * 4 <= kSumsAtOnce) {
            if (!all_sums_asked_.exchange(true)) add(ranges, sums_, places_.sums * 4);
            return;
        }
        for (uint64_t v : blocks) {
            const Run& run = run_of(v);
            const uint64_t at = 4 * (run.sum + (v - run.v)), page = at / page_, bit = uint64_t{1} << (page & 63);
            if (!(sum_pages_asked_[page >> 6].fetch_or(bit, std::memory_order_relaxed) & bit)) add(ranges, sums_ + at, 4);
        }
    }

    Outcome fault_at(const void* at) const {
        Outcome outcome;
        outcome.kind = Outcome::fault;
        const uint64_t v = (reinterpret_cast<uint64_t>(at) - origin_) / kBlock;
        outcome.file = v < v_blocks_ ? run_of(v).file : places_.sums_file;
        return outcome;
    }

    // Compare those of the blocks (ascending after this) that were not compared in this generation.
    Outcome verify_blocks(std::vector<uint64_t>& blocks, uint64_t generation) {
        sort_unique(blocks);
        constexpr size_t kPiece = 256;
        for (size_t begin = 0; begin < blocks.size(); begin += kPiece) {
            const size_t end = std::min(blocks.size(), begin + kPiece);
            volatile bool damaged = false;
            volatile uint64_t which = 0;
            const void* fault = guarded([&] {
                for (size_t i = begin; i < end; i++) {
                    const uint64_t v = blocks[i];
                    if (verified_[v >> 6].load(std::memory_order_relaxed) >> (v & 63) & 1) continue;
                    const Run& run = run_of(v);
                    if (crc32(line_ + v * kBlock, length_of(run, v)) != sum_of(run, v)) {
                        damaged = true;
                        which = run.sum + (v - run.v);
                        return;
                    }
                }
            });
            if (fault) return fault_at(fault);
            if (damaged) {
                Outcome outcome;
                outcome.kind = Outcome::damaged;
                outcome.number = which;
                return outcome;
            }
            std::lock_guard<ForkMutex> hold(changing_);
            if (generation != generation_) continue;  // the file changed meanwhile: what was seen proves nothing
            for (size_t i = begin; i < end; i++)
                verified_[blocks[i] >> 6].fetch_or(uint64_t{1} << (blocks[i] & 63), std::memory_order_relaxed);
        }
        return {};
    }

    // While the thread asks the device, compare here what has arrived: what is wrong is found again by take().
    void verify_behind(const Ticket& ticket, int64_t begin, int64_t end) {
        if (!is_asking(ticket)) return;
        const uint64_t generation = generation_.load(std::memory_order_acquire);
        std::vector<uint64_t> blocks = unverified(ticket, begin, end), piece;
        sort_unique(blocks);
        auto next = blocks.begin();
        while (is_asking(ticket)) {
            const auto settled = std::lower_bound(next, blocks.end(), ticket.settled.load(std::memory_order_acquire));
            if (settled == next) {
                usleep(200);
                continue;
            }
            piece.assign(next, settled);
            if (verify_blocks(piece, generation).kind != Outcome::ok) return;
            next = settled;
        }
    }

    Outcome verify_rows(const Ticket& ticket, int64_t begin, int64_t end, uint64_t generation) {
        std::vector<uint64_t> blocks = unverified(ticket, begin, end);
        return verify_blocks(blocks, generation);
    }

    std::vector<uint64_t> unverified(const Ticket& ticket, int64_t begin, int64_t end) const {
        std::vector<uint64_t> blocks;
        const uint64_t* address = ticket.address.get();
        for (const auto& part : places_.parts) {
            const uint64_t bytes = part.front().bytes;
            for (int64_t i = begin; i < end; i++) {
                const uint64_t at = address[i] - origin_;
                for (uint64_t v = at / kBlock; v <= (at + bytes - 1) / kBlock; v++)
                    if (!(verified_[v >> 6].load(std::memory_order_relaxed) >> (v & 63) & 1)) blocks.push_back(v);
            }
            address += ticket.n;
        }
        return blocks;
    }

    uint64_t page_ = 0, bytes_ = 0;
    uint8_t* line_ = nullptr;
    std::atomic<bool> bounded_{false}, all_sums_asked_{false};
    Marks sum_pages_asked_;
};

}  // namespace

std::shared_ptr<PageReader> make_mmap_reader(Places places, bool verify) {
    return std::make_shared<MmapReader>(std::move(places), verify);
}

}  // namespace engram
