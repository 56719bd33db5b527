// Blocks read by a pool of threads with pread: for systems without madvise(WILLNEED) on mappings, and for comparison.
#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <fcntl.h>
#include <functional>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <unistd.h>

#include "pages_arena.h"

namespace engram {
namespace {

constexpr size_t kThreads = 16;

// Threads that wait on the device, not on processors: made when first needed, kept as long as the process lives.
class Pool {
  public:
    // Call job(0) … job(count - 1) on any threads, the caller's among them; returns when all have returned.
    void run(size_t count, const std::function<void(size_t)>& job) {
        if (count < 2) {
            if (count) job(0);
            return;
        }
        auto work = std::make_shared<Work>(Work{&job, count});
        std::unique_lock<std::mutex> lock(mutex_);
        for (; threads_ < std::min(kThreads, count - 1); threads_++) std::thread([this] { serve(); }).detach();
        waiting_.push_back(work);
        lock.unlock();
        there_is_work_.notify_all();
        help(*work);
        lock.lock();
        finished_.wait(lock, [&] { return work->done == count; });
    }

  private:
    struct Work {
        const std::function<void(size_t)>* job;
        size_t count;
        std::atomic<size_t> next{0}, done{0};
        Work(const std::function<void(size_t)>* j, size_t c) : job(j), count(c) {}
        Work(Work&& other) noexcept : job(other.job), count(other.count) {}
    };

    void help(Work& work) {
        for (size_t i; (i = work.next++) < work.count;) {
            (*work.job)(i);
            if (++work.done == work.count) {
                std::lock_guard<std::mutex> hold(mutex_);
                finished_.notify_all();
            }
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            while (waiting_.empty()) there_is_work_.wait(lock);
            const std::shared_ptr<Work> work = waiting_.front();
            if (work->next >= work->count) {
                waiting_.pop_front();
                continue;
            }
            lock.unlock();
            help(*work);
            lock.lock();
        }
    }

    std::mutex mutex_;
    std::condition_variable there_is_work_, finished_;
    std::deque<std::shared_ptr<Work>> waiting_;
    size_t threads_ = 0;
};

Pool* pool = new Pool;  // never deleted: its threads run until the process ends

class PreadReader : public ArenaReader {
  public:
    PreadReader(Places places, bool verify) : ArenaReader(std::move(places), verify) {
        // A child of fork() has none of the threads.
        static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
        (void)registered;
        for (File& file : places_.files) {
            const int own = open_again(file.fd, 0);  // advice goes to an open file, which a duplicate would share
            if (own >= 0) {
                close(file.fd);
                file.fd = own;
            }
#ifdef POSIX_FADV_RANDOM
            posix_fadvise(file.fd, 0, 0, POSIX_FADV_RANDOM);
#endif
        }
    }

  protected:
    Outcome read_blocks(const std::vector<uint64_t>& blocks, uint8_t* arena, bool& lost) override {
        std::atomic<int> error{0}, file{-1};
        pool->run(blocks.size(), [&](size_t i) {
            if (file >= 0) return;
            const Run& run = run_of(blocks[i]);
            const uint64_t length = length_of(run, blocks[i]), begin = offset_of(run, blocks[i]);
            for (uint64_t got = 0; got < length;) {
                const ssize_t more = pread(places_.files[run.file].fd, arena + i * kBlock + got, length - got,
                                           static_cast<off_t>(begin + got));
                if (more < 0 && errno == EINTR) continue;
                if (more <= 0) {
                    error = more < 0 ? errno : 0;
                    file = run.file;
                    return;
                }
                got += static_cast<uint64_t>(more);
            }
        });
        return file >= 0 ? failed(file, error) : Outcome{};
    }
};

}  // namespace

std::shared_ptr<PageReader> make_pread_reader(Places places, bool verify) {
    return std::make_shared<PreadReader>(std::move(places), verify);
}

}  // namespace engram
