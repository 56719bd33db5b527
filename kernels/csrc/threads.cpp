#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif

namespace engram {
namespace {

using Job = std::function<void(int64_t, int64_t)>;

class Pool {
public:
    // False where another call holds the pool: the caller then works alone.
    bool run(int64_t n, int64_t piece, int helpers, const Job& job) {
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (!only.owns_lock()) return false;
        while (int(workers_.size()) < helpers) workers_.emplace_back([this, i = int(workers_.size())] { serve(i); });
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job, total_ = n, piece_ = piece, helpers_ = helpers, left_ = helpers;
            next_.store(0, std::memory_order_relaxed);
            ++turn_;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(state_);
        done_.wait(lock, [this] { return left_ == 0; });
        return true;
    }

private:
    void work() {
        for (;;) {
            const int64_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
            if (begin >= total_) return;
            (*job_)(begin, begin + piece_ < total_ ? begin + piece_ : total_);
        }
    }
    void serve(int index) {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(state_);
                wake_.wait(lock, [&] { return turn_ != seen; });
                seen = turn_;
                if (index >= helpers_) continue;
            }
            work();
            std::lock_guard<std::mutex> lock(state_);
            if (--left_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, state_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const Job* job_ = nullptr;
    int64_t total_ = 0, piece_ = 1;
    int helpers_ = 0, left_ = 0;
    uint64_t turn_ = 0;
    std::atomic<int64_t> next_{0};
};

// Made anew in a forked child, whose copy has no threads. Never destroyed: threads wait in it until the process ends.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    static std::atomic<pid_t> owner{0};
    static std::mutex making;
    if (owner.load(std::memory_order_acquire) != getpid()) {
        std::lock_guard<std::mutex> lock(making);
        if (owner.load(std::memory_order_relaxed) != getpid()) {
            current.store(new Pool, std::memory_order_relaxed);
            owner.store(getpid(), std::memory_order_release);
        }
    }
    return *current.load(std::memory_order_relaxed);
}

}  // namespace

int available_threads() {
    static const int count = [] {
        if (const char* text = std::getenv("ENGRAM_THREADS")) {
            const int asked = std::atoi(text);
            if (asked > 0) return asked;
        }
#ifdef __linux__
        cpu_set_t set;
        if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
        const int cores = int(std::thread::hardware_concurrency());
        return cores > 0 ? cores : 1;
    }();
    return count;
}

void parallel_for(int64_t n, int64_t grain, int threads, const Job& job) {
    const int most = threads > 0 ? threads : available_threads();
    const int64_t pieces = grain > 0 ? n / grain : n;
    const int64_t team = pieces < most ? pieces : most;
    if (n <= 0) return;
    // Four pieces a thread even out rows that lie nearer and rows that lie farther.
    const int64_t piece = team > 1 ? (n + 4 * team - 1) / (4 * team) : n;
    if (team <= 1 || !pool().run(n, piece < grain ? grain : piece, int(team) - 1, job)) job(0, n);
}

}  // namespace engram
