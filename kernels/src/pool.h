// Threads that share the tasks of a call.
//
// During a call workers spin for its next phase, so that phases cost no wake-up.  After it they stay
// awake for a moment, lest every small product wake them anew, and give way to whoever wants the core;
// then they sleep.  On Linux they run on the cores that the caller may run on, of few ones but for the
// one where it is when it wakes them.  A call that finds the pool taken by another thread computes alone.
//
// Safe after fork: the child, which has no workers, forgets its parent's pool.  Safe at exit: the
// pool is never destroyed, so sleeping workers have nothing pulled away from under them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace zk {

class Pool;

// What a thread takes of a run: [begin, end), its number among the team's threads, and whether it
// takes anything of this run for the first time.
struct Range {
    int64_t begin, end;
    int thread;
    bool first;
};

// The threads of one call; they are free again when it is destroyed.
class Team {
public:
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // body(range), or body(begin, end), for ranges that cover [0, count) once, none longer than
    // `longest`.  Each thread starts on a contiguous share of its own.
    template <typename Body>
    void run(int64_t count, int64_t longest, const Body& body) {
        run(count, longest, &call<Body>, &body);
    }

    // How many threads compute, at most.
    int threads() const { return threads_; }

private:
    using Function = void (*)(const void* body, const Range& range);

    template <typename Body>
    static void call(const void* body, const Range& range) {
        const Body& own = *static_cast<const Body*>(body);
        if constexpr (std::is_invocable_v<const Body&, const Range&>) own(range);
        else own(range.begin, range.end);
    }
    void run(int64_t count, int64_t longest, Function function, const void* body);

    Pool* pool_ = nullptr;  // null: alone
    int threads_ = 1;

    friend class Pool;
};

}  // namespace zk
