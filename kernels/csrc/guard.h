// A file that is cut short while it is mapped makes the processor fault (SIGBUS). Inside `guarded` that ends the copy
// instead of the process.
#pragma once
#include <csetjmp>

namespace engram {

struct GuardFrame {
    sigjmp_buf place;
    const void* address;  // what the processor could not read
};

// Install the handler, chained before whoever is there; cheap when it already is. Call it before `guarded`.
void arm_guard();

// This thread's innermost guarded call; null outside of one.
GuardFrame* enter_guard(GuardFrame* frame);

// Run body() and return null, or the address that could not be read. The fault jumps out of body: nothing in it may
// hold a lock, own memory or have a destructor that matters.
template <class Body>
const void* guarded(const Body& body) {
    GuardFrame frame;
    frame.address = nullptr;
    GuardFrame* const outer = enter_guard(&frame);
    // The signal mask need not be saved: the handler runs with SIGBUS unblocked (SA_NODEFER).
    if (sigsetjmp(frame.place, 0) == 0) body();
    enter_guard(outer);
    return frame.address;
}

}  // namespace engram
