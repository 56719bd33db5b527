#include "guard.h"

#include <csignal>
#include <mutex>

namespace engram {
namespace {

#ifdef __linux__  // the handler must not allocate, which the default access to thread-local data may do
#define ENGRAM_TLS __attribute__((tls_model("initial-exec"))) thread_local
#else
#define ENGRAM_TLS thread_local
#endif
ENGRAM_TLS GuardFrame* volatile innermost = nullptr;
ENGRAM_TLS volatile bool passing_on = false;

std::mutex installing;
struct sigaction before;  // who handled SIGBUS before us

void on_fault(int signal, siginfo_t* info, void* context) {
    if (GuardFrame* frame = innermost) {
        frame->address = info->si_addr ? info->si_addr : frame;  // never null: null means "no fault"
        siglongjmp(frame->place, 1);
    }
    // Not ours. A previous handler that raises the signal again comes back here: then the default must act.
    const bool has_previous = before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN;
    if (has_previous && !passing_on) {
        passing_on = true;
        if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(signal, info, context);
        else before.sa_handler(signal);
        passing_on = false;
        return;
    }
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &standard, nullptr);
    raise(signal);
}

bool is_ours(const struct sigaction& action) {
    return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_fault;
}

}  // namespace

void arm_guard() {
    struct sigaction now;
    if (sigaction(SIGBUS, nullptr, &now) == 0 && is_ours(now)) return;
    std::lock_guard<std::mutex> hold(installing);
    if (sigaction(SIGBUS, nullptr, &now) == 0 && is_ours(now)) return;
    before = now;
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

GuardFrame* enter_guard(GuardFrame* frame) {
    GuardFrame* const outer = innermost;
    innermost = frame;
    return outer;
}

}  // namespace engram
