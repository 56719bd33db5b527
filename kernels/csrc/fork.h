// Locks that survive fork(): the child has none of the parent's other threads, so a lock that one of them held would
// never open again. In the child every lock starts anew.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>

namespace engram {

uint64_t process_number();  // grows by one in a child of fork(); page_worker.cpp

class ForkMutex {
  public:
    ForkMutex() : current_(new Lock{process_number(), {}}) {}
    ~ForkMutex() { delete current_.load(); }
    ForkMutex(const ForkMutex&) = delete;

    void lock() { now().lock(); }
    void unlock() { now().unlock(); }

  private:
    struct Lock {
        uint64_t process;
        std::mutex mutex;
    };

    std::mutex& now() {
        Lock* lock = current_;
        if (lock->process != process_number()) {
            Lock* fresh = new Lock{process_number(), {}};
            // The old one is left alone: destroying a locked lock is not defined.
            if (current_.compare_exchange_strong(lock, fresh)) return fresh->mutex;
            delete fresh;
        }
        return lock->mutex;
    }

    std::atomic<Lock*> current_;
};

}  // namespace engram
