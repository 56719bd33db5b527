// One background thread for all tables of the process: asks of later tickets go before waits for earlier ones.
// A ticket that is needed before the thread came to it is finished by whoever needs it.
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <pthread.h>
#include <thread>

#include "fork.h"
#include "pages.h"

namespace engram {
namespace {

struct Worker {
    std::mutex mutex;
    std::condition_variable work, progress;
    std::deque<std::shared_ptr<Ticket>> to_ask, to_await;
    const PageReader* busy = nullptr;  // whose ticket the thread holds
    bool started = false;
    uint64_t process = 1;
};

Worker* worker = new Worker;  // never deleted: its thread runs until the process ends

// A child of fork() has no background thread, and the lock may be held by a thread that it does not have.
void in_child() {
    const uint64_t process = worker->process + 1;
    worker = new Worker;
    worker->process = process;
}

const int registered = pthread_atfork(nullptr, nullptr, in_child);

void advance(std::unique_lock<std::mutex>& lock, Worker& w, Ticket& ticket, Ticket::State busy, Ticket::State next) {
    ticket.state = busy;
    lock.unlock();
    if (busy == Ticket::asking) ticket.reader->ask_device(ticket);
    else ticket.reader->await_device(ticket);
    lock.lock();
    ticket.state = next;
    w.progress.notify_all();
}

Ticket::State after_ask(const Ticket& ticket) { return ticket.reader->wants_await() ? Ticket::asked : Ticket::done; }

void serve(Worker& w) {
    std::unique_lock<std::mutex> lock(w.mutex);
    for (;;) {
        std::shared_ptr<Ticket> ticket;
        if (!w.to_ask.empty()) {
            ticket = std::move(w.to_ask.front());
            w.to_ask.pop_front();
            w.busy = ticket->reader.get();
            if (ticket->state == Ticket::queued) {
                advance(lock, w, *ticket, Ticket::asking, after_ask(*ticket));
                if (ticket->state == Ticket::asked) w.to_await.push_back(ticket);
            }
        } else if (!w.to_await.empty()) {
            ticket = std::move(w.to_await.front());
            w.to_await.pop_front();
            w.busy = ticket->reader.get();
            if (ticket->state == Ticket::asked) advance(lock, w, *ticket, Ticket::verifying, Ticket::done);
        } else {
            w.work.wait(lock);
            continue;
        }
        lock.unlock();
        ticket.reset();  // perhaps the last reference to a reader: unmapping takes time
        lock.lock();
        w.busy = nullptr;
        w.progress.notify_all();
    }
}

}  // namespace

uint64_t process_number() {
    (void)registered;
    return worker->process;
}

void enqueue(const std::shared_ptr<Ticket>& ticket) {
    Worker& w = *worker;
    std::unique_lock<std::mutex> lock(w.mutex);
    if (!w.started) {
        std::thread(serve, std::ref(w)).detach();
        w.started = true;
    }
    ticket->process = w.process;
    ticket->state = Ticket::queued;
    w.to_ask.push_back(ticket);
    lock.unlock();
    w.work.notify_one();
}

void finish(Ticket& ticket) {
    if (ticket.state == Ticket::done) return;
    Worker& w = *worker;
    std::unique_lock<std::mutex> lock(w.mutex);
    if (ticket.process != w.process) {  // asked before a fork, in the parent
        ticket.process = w.process;
        ticket.state = Ticket::queued;
    }
    while (ticket.state != Ticket::done) {
        if (ticket.state == Ticket::queued) advance(lock, w, ticket, Ticket::asking, after_ask(ticket));
        else if (ticket.state == Ticket::asked) advance(lock, w, ticket, Ticket::verifying, Ticket::done);
        else w.progress.wait(lock);
    }
}

bool is_asking(const Ticket& ticket) {
    const int state = ticket.state;
    return (state == Ticket::queued || state == Ticket::asking) && ticket.process == worker->process;
}

void withdraw(const PageReader& reader) {
    Worker& w = *worker;
    std::unique_lock<std::mutex> lock(w.mutex);
    const auto is_its = [&](const std::shared_ptr<Ticket>& ticket) { return ticket->reader.get() == &reader; };
    w.to_ask.erase(std::remove_if(w.to_ask.begin(), w.to_ask.end(), is_its), w.to_ask.end());
    w.to_await.erase(std::remove_if(w.to_await.begin(), w.to_await.end(), is_its), w.to_await.end());
    w.progress.wait(lock, [&] { return w.busy != &reader; });
}

}  // namespace engram
