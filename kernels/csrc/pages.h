// Rows that lie in files: where they are, which 4 KiB blocks of the files hold them, and how a row comes out of them.
//
// Blocks of all files are numbered in one line ("v" numbers), so that a row is one address v * 4096 + place in block,
// and a block is one bit in a bitmap. Back ends differ in how a block becomes memory: pages_mmap.h maps all of them,
// pages_arena.h reads those that a ticket needs.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <sys/stat.h>
#include <vector>

#include "fork.h"
#include "rows.h"

namespace engram {

constexpr uint64_t kBlock = 4096;
constexpr int kAttempts = 8;  // at rows of a file that changes while they are taken

struct File {
    int fd = -1;         // owned
    uint64_t bytes = 0;  // size that it must have
};

// Blocks of a file that lie together and hold rows.
struct Run {
    int file;
    uint64_t first, blocks;  // in blocks of the file
    uint64_t sum;            // number of the first block's checksum
    uint64_t v;              // number of the first block; set by the reader
};

// Rows that lie evenly spaced: row i at offset + (i / per_page) * pitch + (i % per_page) * bytes of the file.
struct Segment {
    uint64_t first_row, rows;
    int run;
    uint64_t offset, pitch;
    uint32_t per_page, bytes;
    uint64_t address;  // of its first row; set by the reader
    uint64_t magic;    // floor(2^64 / per_page) + 1: the high half of i * magic is i / per_page for i < 2^48
};

// Everything that says where the rows of one table are.
struct Places {
    std::vector<File> files;
    std::vector<Run> runs;
    std::vector<std::vector<Segment>> parts;  // a row is the bytes of its parts, one after another
    uint64_t rows = 0;
    int sums_file = -1;  // little-endian CRC-32 of every block, `sums` of them from this offset
    uint64_t sums_offset = 0, sums = 0;
};

// How a call ended. Words are made of it in Python.
struct Outcome {
    enum Kind { ok = 0, damaged, resized, fault, unreadable, unsteady, rewritten } kind = ok;
    int file = -1;
    uint64_t number = 0;  // damaged: number of the checksum; resized: bytes now; unreadable: errno
};

// Changes with every change of a file's bytes or times; a program can set the first back, but not the second.
struct Stamp {
    int64_t changed = 0, status = 0;
    bool operator!=(const Stamp& o) const { return changed != o.changed || status != o.status; }
};

// Rows that were asked for. `address` holds one number a row and part, which the back end turns into a pointer.
class PageReader;
struct Ticket {
    std::shared_ptr<PageReader> reader;
    int64_t n = 0;
    std::unique_ptr<uint64_t[]> address;
    std::vector<uint64_t> wanted;      // v numbers to ask the device for
    std::vector<uint64_t> unverified;  // v numbers whose checksum was not compared
    std::atomic<uint64_t> settled{0};     // blocks below this v number were asked for some time ago
    std::atomic<uint64_t> generation{0};  // of the marks under which all its blocks were verified; 0: none
    std::unique_ptr<uint8_t, void (*)(void*)> arena{nullptr, free};  // pages_arena.h: its blocks,
    std::unique_ptr<uint64_t[]> pointer;                             // where in it the rows are,
    Outcome outcome;                                                 // and how reading into it ended
    // page_worker.cpp; guarded by its mutex, or final before the ticket is shared
    enum State { queued, asking, asked, verifying, done };
    std::atomic<int> state{done};
    uint64_t process = 0;  // that queued it; 0: never queued
};

// What take() makes of the rows.
struct Sink {
    uint8_t* out = nullptr;
    RowCodec codec;  // code -1: copy the bytes
    int64_t width = 0;
    bool bf16 = false;
    int threads = 1;
};

class PageReader : public std::enable_shared_from_this<PageReader> {
  public:
    PageReader(Places places, bool verify);
    virtual ~PageReader();
    PageReader(const PageReader&) = delete;

    // Note the addresses of n rows and start reading what is missing. Returns -1, or the place of the first id that is
    // outside the table (then nothing was started).
    int64_t ask(const int64_t* rows, int64_t n, const std::shared_ptr<Ticket>& ticket);
    // Wait for the ticket and make its rows begin … end.
    virtual Outcome take(Ticket& ticket, int64_t begin, int64_t end, const Sink& sink) = 0;
    // The two halves of a ticket's background work: ask the device, then wait for it and compare checksums.
    virtual void ask_device(Ticket& ticket) = 0;
    virtual void await_device(Ticket& ticket) = 0;
    virtual bool wants_await() const { return true; }
    // Give back memory; forget what was asked for.
    virtual void trim();
    virtual void set_bounded(bool) {}  // a bound on memory: nothing may be mapped in before it is taken
    // Every block was compared with its checksum since this reader was made.
    virtual void mark_verified() {}
    // Cut a ticket's rows so that no piece touches more than `folios` changes of 2 MiB stretch.
    virtual std::vector<int64_t> pieces(const Ticket& ticket, int64_t folios) const;

    int64_t row_bytes() const { return row_bytes_; }
    int64_t rows() const { return static_cast<int64_t>(places_.rows); }
    std::atomic<uint64_t> blocks_asked{0};

  protected:
    virtual void start(const std::shared_ptr<Ticket>& ticket) = 0;
    // Fill in the ticket's addresses and, with marks, what is missing; -1, or the place of the first bad id.
    template <bool kMarks>
    int64_t note(const int64_t* rows, int64_t n, Ticket& ticket);
    // Rows at address[0 … n), other parts of them `apart` further on; `fault` is set where one could not be read.
    void make_rows(const uint8_t* const* address, int64_t n, int64_t apart, const Sink& sink,
                   std::atomic<const void*>& fault) const;
    const Run& run_of(uint64_t v) const;
    uint64_t length_of(const Run& run, uint64_t v) const;  // bytes of block v: 4096, or less at the file's end
    // The stored checksum of a block; call under a guard.
    uint32_t sum_of(const Run& run, uint64_t v) const;
    // ok: the files are as they were in this generation, and so is what was verified in it. unsteady: one was written
    // to; all marks are cleared and a new generation begins. Otherwise what is wrong for good.
    Outcome unchanged(uint64_t generation);
    virtual void clear_marks() {}

    Places places_;
    bool verify_;
    int64_t row_bytes_ = 0;
    uint64_t v_blocks_ = 0;  // blocks in the line, gaps included
    uint64_t origin_ = 0;    // added to every address: where the line is mapped; 0 where it is not
    std::unique_ptr<std::atomic<uint64_t>[]> asked_, verified_;  // one bit a block; null in back ends without marks
    std::atomic<uint64_t> generation_{1};
    const uint8_t* sums_ = nullptr;
    ForkMutex changing_;  // guards stamps_, and marks against their generation

  private:
    bool sums_crc(uint32_t& crc) const;

    std::vector<Stamp> stamps_;
    bool sums_are_ours_ = true;
    uint32_t sums_crc_ = 0;  // of all checksums: who replaces a table by another one replaces them too
    void* sums_map_ = nullptr;
    size_t sums_map_bytes_ = 0;
};

std::shared_ptr<PageReader> make_mmap_reader(Places places, bool verify);
#ifdef __linux__
std::shared_ptr<PageReader> make_uring_reader(Places places, bool verify);
#endif
std::shared_ptr<PageReader> make_pread_reader(Places places, bool verify);

// page_worker.cpp: one background thread for the process.
void enqueue(const std::shared_ptr<Ticket>& ticket);  // asks before awaits, each first come first served
void finish(Ticket& ticket);                          // wait for it, or do the work here if nobody began it
bool is_asking(const Ticket& ticket);                 // the thread asks the device for it, or soon will
void withdraw(const PageReader& reader);              // drop its tickets from the queues; the thread holds none after

}  // namespace engram
