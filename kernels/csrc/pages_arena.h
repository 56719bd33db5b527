// Back ends without a mapping: the distinct blocks of a ticket are read into memory of its own, each is compared with
// its checksum, and rows come out of that memory. Every ticket reads anew.
#pragma once
#include "pages.h"

namespace engram {

class ArenaReader : public PageReader {
  public:
    using PageReader::PageReader;

    Outcome take(Ticket& ticket, int64_t begin, int64_t end, const Sink& sink) override;
    void ask_device(Ticket& ticket) override;
    void await_device(Ticket& ticket) override;
    std::vector<int64_t> pieces(const Ticket& ticket, int64_t folios) const override;
    void set_bounded(bool bounded) override { bounded_ = bounded; }

  protected:
    void start(const std::shared_ptr<Ticket>& ticket) override;
    // Read blocks (v numbers, ascending) to arena, arena + 4096, …; several threads may call this.
    // `lost`: it failed while the device may still write into the arena, which must never be used for anything else.
    virtual Outcome read_blocks(const std::vector<uint64_t>& blocks, uint8_t* arena, bool& lost) = 0;
    // Byte of the file at which block v begins.
    uint64_t offset_of(const Run& run, uint64_t v) const { return (run.first + (v - run.v)) * kBlock; }
    // What a read that ended early, or with an errno, means.
    Outcome failed(int file, int error) const;

  private:
    struct Part;  // rows begin … end of a ticket, read
    void read(const Ticket& ticket, int64_t begin, int64_t end, Part& part);
    Outcome compare(const Part& part) const;
    uint64_t point(uint64_t address, const Part& part) const;
    Outcome read_now(const Ticket& ticket, int64_t begin, int64_t end, const Sink& sink);

    std::atomic<bool> bounded_{false};
};

// Another descriptor of an open file, with flags of its own; -1 and errno where the system has none.
int open_again(int fd, int flags);

}  // namespace engram
