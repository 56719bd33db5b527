#include "pages_arena.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <string>

#include "guard.h"
#include "rows.h"

namespace engram {

struct ArenaReader::Part {
    std::vector<uint64_t> blocks;  // ascending
    std::unique_ptr<uint8_t, void (*)(void*)> arena{nullptr, free};
    Outcome outcome;
};

int open_again(int fd, int flags) {
#ifdef __linux__
    return open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDONLY | O_CLOEXEC | flags);
#else
    (void)fd, (void)flags;
    errno = ENOTSUP;
    return -1;
#endif
}

Outcome ArenaReader::failed(int file, int error) const {
    Outcome outcome;
    outcome.kind = error ? Outcome::unreadable : Outcome::unsteady;  // it ended early, but is whole again
    outcome.file = file;
    outcome.number = static_cast<uint64_t>(error);
    return outcome;
}

void ArenaReader::read(const Ticket& ticket, int64_t begin, int64_t end, Part& part) {
    const uint64_t* address = ticket.address.get();
    for (const auto& segments : places_.parts) {
        const uint64_t bytes = segments.front().bytes;
        for (int64_t i = begin; i < end; i++)
            for (uint64_t v = address[i] / kBlock; v <= (address[i] + bytes - 1) / kBlock; v++) part.blocks.push_back(v);
        address += ticket.n;
    }
    std::sort(part.blocks.begin(), part.blocks.end());
    part.blocks.erase(std::unique(part.blocks.begin(), part.blocks.end()), part.blocks.end());
    void* memory = nullptr;
    if (posix_memalign(&memory, kBlock, part.blocks.size() * kBlock)) {
        part.outcome = failed(0, ENOMEM);
        return;
    }
    part.arena.reset(static_cast<uint8_t*>(memory));
    bool lost = false;
    part.outcome = read_blocks(part.blocks, part.arena.get(), lost);
    if (lost) (void)part.arena.release();
    blocks_asked += part.blocks.size();
}

Outcome ArenaReader::compare(const Part& part) const {
    volatile size_t wrong = part.blocks.size();
    Outcome outcome;
    if (!verify_) return outcome;
    arm_guard();  // the checksums are mapped
    const void* fault = guarded([&] {
        for (size_t i = 0; i < part.blocks.size(); i++) {
            const Run& run = run_of(part.blocks[i]);
            const uint64_t v = part.blocks[i];
            if (crc32(part.arena.get() + i * kBlock, length_of(run, v)) == sum_of(run, v)) continue;
            wrong = i;
            return;
        }
    });
    if (fault) return failed(places_.sums_file, EIO);
    if (wrong == part.blocks.size()) return outcome;
    const Run& run = run_of(part.blocks[wrong]);
    outcome.kind = Outcome::damaged;
    outcome.file = run.file;
    outcome.number = run.sum + (part.blocks[wrong] - run.v);
    return outcome;
}

// From a place in the line of blocks to a place in the arena. A row that goes over to the next block finds it behind
// its first one: both were wanted, and the blocks ascend.
uint64_t ArenaReader::point(uint64_t address, const Part& part) const {
    const auto at = std::lower_bound(part.blocks.begin(), part.blocks.end(), address / kBlock) - part.blocks.begin();
    return reinterpret_cast<uint64_t>(part.arena.get()) + at * kBlock + address % kBlock;
}

void ArenaReader::start(const std::shared_ptr<Ticket>& ticket) {
    if (!bounded_) enqueue(ticket);
}

void ArenaReader::ask_device(Ticket& ticket) {
    Part part;
    read(ticket, 0, ticket.n, part);
    ticket.wanted = std::move(part.blocks);
    ticket.arena = std::move(part.arena);
    ticket.outcome = part.outcome;
}

void ArenaReader::await_device(Ticket& ticket) {
    if (ticket.outcome.kind != Outcome::ok) return;
    Part part;
    part.blocks = std::move(ticket.wanted);
    part.arena = std::move(ticket.arena);
    ticket.outcome = compare(part);
    const int64_t count = ticket.n * static_cast<int64_t>(places_.parts.size());
    if (ticket.outcome.kind == Outcome::ok) {
        ticket.pointer.reset(new uint64_t[count]);
        for (int64_t i = 0; i < count; i++) ticket.pointer[i] = point(ticket.address[i], part);
    }
    ticket.arena = std::move(part.arena);
}

Outcome ArenaReader::take(Ticket& ticket, int64_t begin, int64_t end, const Sink& sink) {
    finish(ticket);
    arm_guard();
    Outcome outcome;
    for (int attempt = 0; attempt < kAttempts; attempt++) {
        const uint64_t generation = generation_.load(std::memory_order_acquire);
        std::atomic<const void*> fault{nullptr};  // the arena is ordinary memory: none comes
        if (ticket.process && ticket.generation == generation) {
            outcome = ticket.outcome;
            const auto* pointer = reinterpret_cast<const uint8_t* const*>(ticket.pointer.get());
            if (outcome.kind == Outcome::ok) make_rows(pointer + begin, end - begin, ticket.n, sink, fault);
        } else {
            outcome = read_now(ticket, begin, end, sink);
        }
        const Outcome files = unchanged(generation);
        if (files.kind == Outcome::ok) return outcome;
        if (files.kind != Outcome::unsteady) return files;
        if (outcome.kind == Outcome::ok) outcome = files;
    }
    return outcome;
}

// Without what the background read: memory is bounded, or the file changed since.
Outcome ArenaReader::read_now(const Ticket& ticket, int64_t begin, int64_t end, const Sink& sink) {
    Part part;
    read(ticket, begin, end, part);
    if (part.outcome.kind == Outcome::ok) part.outcome = compare(part);
    if (part.outcome.kind != Outcome::ok) return part.outcome;
    std::vector<uint64_t> pointer;
    for (size_t p = 0; p < places_.parts.size(); p++)
        for (int64_t i = begin; i < end; i++) pointer.push_back(point(ticket.address[p * ticket.n + i], part));
    std::atomic<const void*> fault{nullptr};
    make_rows(reinterpret_cast<const uint8_t* const*>(pointer.data()), end - begin, end - begin, sink, fault);
    return {};
}

std::vector<int64_t> ArenaReader::pieces(const Ticket& ticket, int64_t folios) const {
    // Half of the stretches' bytes in blocks, two for each part of a row; the rest is for what this allocates besides.
    const int64_t rows = std::max<int64_t>(1, folios * 256 / (2 * static_cast<int64_t>(places_.parts.size())));
    std::vector<int64_t> edges;
    for (int64_t i = 0; i < ticket.n; i += rows) edges.push_back(i);
    edges.push_back(ticket.n);
    return edges;
}

}  // namespace engram
