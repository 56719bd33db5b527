// A pool of threads that lives as long as the process: no thread is made per call, none is used for small work.
#pragma once
#include <cstdint>
#include <functional>

namespace engram {

// Threads that the process may use: the affinity mask's processors, or ENGRAM_THREADS.
int available_threads();

// Run job(begin, end) over pieces of 0 … n on at most `threads` threads (0: available_threads()), each piece of at
// least `grain`. The calling thread takes part. Nested and concurrent calls run on the calling thread alone, so that
// threads never outnumber processors. Pieces must not throw.
void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& job);

}  // namespace engram
