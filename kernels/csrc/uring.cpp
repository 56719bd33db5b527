// Blocks read past the page cache: io_uring with O_DIRECT, 64 at a time. Linux only; no library, three system calls.
#ifdef __linux__
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdexcept>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fork.h"
#include "pages_arena.h"

namespace engram {
namespace {

constexpr unsigned kDepth = 64;

// The two rings that the process shares with the kernel.
class Ring {
  public:
    Ring() {
        io_uring_params params = {};
        fd_ = static_cast<int>(syscall(SYS_io_uring_setup, kDepth, &params));
        if (fd_ < 0) throw std::runtime_error(std::string("io_uring_setup: ") + std::strerror(errno));
        if (!(params.features & IORING_FEAT_SINGLE_MMAP)) {
            close(fd_);
            throw std::runtime_error("this kernel's io_uring is too old");
        }
        bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                          params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
        rings_ = map(bytes_, IORING_OFF_SQ_RING);
        entry_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        entries_ = static_cast<io_uring_sqe*>(map(entry_bytes_, IORING_OFF_SQES));
        auto* base = static_cast<uint8_t*>(rings_);
        sq_tail_ = reinterpret_cast<unsigned*>(base + params.sq_off.tail);
        sq_mask_ = *reinterpret_cast<unsigned*>(base + params.sq_off.ring_mask);
        sq_array_ = reinterpret_cast<unsigned*>(base + params.sq_off.array);
        cq_head_ = reinterpret_cast<unsigned*>(base + params.cq_off.head);
        cq_tail_ = reinterpret_cast<unsigned*>(base + params.cq_off.tail);
        cq_mask_ = *reinterpret_cast<unsigned*>(base + params.cq_off.ring_mask);
        cqes_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
    }
    ~Ring() {
        munmap(entries_, entry_bytes_);
        munmap(rings_, bytes_);
        close(fd_);
    }
    Ring(const Ring&) = delete;

    void read(int fd, uint8_t* to, uint64_t offset, uint64_t mark) {
        const unsigned tail = *sq_tail_, at = tail & sq_mask_;
        io_uring_sqe& entry = entries_[at];
        entry = {};
        entry.opcode = IORING_OP_READ;
        entry.fd = fd;
        entry.addr = reinterpret_cast<uint64_t>(to);
        entry.len = kBlock;
        entry.off = offset;
        entry.user_data = mark;
        sq_array_[at] = at;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
        unsent_++;
    }

    // Hand over what is new and wait until something is done; 0 or an errno.
    int submit_and_wait() {
        const long sent = syscall(SYS_io_uring_enter, fd_, unsent_, 1U, IORING_ENTER_GETEVENTS, nullptr, 0);
        if (sent < 0) return errno == EINTR || errno == EAGAIN || errno == EBUSY ? 0 : errno;
        unsent_ -= static_cast<unsigned>(sent);
        return 0;
    }

    template <class Done>
    unsigned reap(const Done& done) {
        unsigned head = *cq_head_, count = 0;
        for (const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); head != tail; head++, count++) {
            const io_uring_cqe& entry = cqes_[head & cq_mask_];
            done(entry.user_data, entry.res);
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
        return count;
    }

    const uint64_t process = process_number();

  private:
    void* map(size_t bytes, uint64_t what) {
        void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, static_cast<off_t>(what));
        if (got == MAP_FAILED) throw std::runtime_error(std::string("io_uring mmap: ") + std::strerror(errno));
        return got;
    }

    int fd_ = -1;
    size_t bytes_ = 0, entry_bytes_ = 0;
    void* rings_ = nullptr;
    io_uring_sqe* entries_ = nullptr;
    unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    unsigned sq_mask_ = 0, cq_mask_ = 0, unsent_ = 0;
    io_uring_cqe* cqes_ = nullptr;
};

class UringReader : public ArenaReader {
  public:
    UringReader(Places places, bool verify) : ArenaReader(std::move(places), verify), ring_(new Ring) {
        for (File& file : places_.files) {
            const int own = open_again(file.fd, O_DIRECT);
            if (own < 0) throw std::runtime_error(std::string("open with O_DIRECT: ") + std::strerror(errno));
            close(file.fd);
            file.fd = own;
        }
        // Some file systems open with O_DIRECT and refuse to read.
        std::unique_ptr<uint8_t, void (*)(void*)> block(static_cast<uint8_t*>(std::aligned_alloc(kBlock, kBlock)), free);
        for (const Run& run : places_.runs)
            if (pread(places_.files[run.file].fd, block.get(), kBlock, static_cast<off_t>(run.first * kBlock)) < 0)
                throw std::runtime_error(std::string("read with O_DIRECT: ") + std::strerror(errno));
    }

  protected:
    Outcome read_blocks(const std::vector<uint64_t>& blocks, uint8_t* arena, bool& lost) override {
        std::lock_guard<ForkMutex> hold(mutex_);
        if (!ring_ || ring_->process != process_number()) ring_.reset(new Ring);  // after fork() it is the parent's
        int error = 0, file = -1;
        size_t next = 0, flying = 0;
        std::vector<uint64_t> again;
        while (flying || ((next < blocks.size() || !again.empty()) && file < 0)) {
            while (file < 0 && flying < kDepth && (next < blocks.size() || !again.empty())) {
                size_t i = next;
                if (again.empty()) next++;
                else {
                    i = again.back();
                    again.pop_back();
                }
                const Run& run = run_of(blocks[i]);
                ring_->read(places_.files[run.file].fd, arena + i * kBlock, offset_of(run, blocks[i]), i);
                flying++;
            }
            if (const int wrong = ring_->submit_and_wait()) {
                ring_.reset();
                lost = true;
                return failed(0, wrong);
            }
            flying -= ring_->reap([&](uint64_t i, int32_t got) {
                const Run& run = run_of(blocks[i]);
                if (got == -EINTR || got == -EAGAIN) again.push_back(i);
                else if (got < static_cast<int64_t>(length_of(run, blocks[i]))) {
                    error = got < 0 ? -got : 0;
                    file = run.file;
                }
            });
        }
        return file >= 0 ? failed(file, error) : Outcome{};
    }

  private:
    ForkMutex mutex_;
    std::unique_ptr<Ring> ring_;
};

}  // namespace

std::shared_ptr<PageReader> make_uring_reader(Places places, bool verify) {
    return std::make_shared<UringReader>(std::move(places), verify);
}

}  // namespace engram
#endif
