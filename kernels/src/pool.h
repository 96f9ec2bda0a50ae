// Threads that share the tasks of a call.
//
// During a call workers spin for its next phase, so that phases cost no wake-up.  After it they stay
// awake for a moment, lest every small product wake them anew, and give way to whoever wants the core;
// then they sleep.  A call that finds the pool taken by another thread computes alone.
//
// Safe after fork: the child, which has no workers, forgets its parent's pool.  Safe at exit: the
// pool is never destroyed, so sleeping workers have nothing pulled away from under them.
#pragma once

#include <cstdint>

namespace zk {

class Pool;

// The threads of one call; they are free again when it is destroyed.
class Team {
public:
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // body(begin, end) for ranges that cover [0, count) once, none longer than `longest`.  Each
    // thread starts on a contiguous share of its own.
    template <typename Body>
    void run(int64_t count, int64_t longest, const Body& body) {
        run(count, longest, &call<Body>, &body);
    }

private:
    using Function = void (*)(const void* body, int64_t begin, int64_t end);

    template <typename Body>
    static void call(const void* body, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(body))(begin, end);
    }
    void run(int64_t count, int64_t longest, Function function, const void* body);

    Pool* pool_ = nullptr;  // null: alone
    int threads_ = 1;

    friend class Pool;
};

}  // namespace zk
