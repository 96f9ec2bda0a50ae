#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace zk {
namespace {

constexpr int kMostThreads = 64;
constexpr int kChunksEach = 8;      // of a thread's share, so that others can take some of them
constexpr int kSpins = 2000;        // before a spinning thread offers its core to others
// How long a worker stays awake for another call: to wake one takes as long as many a product.
constexpr auto kLinger = std::chrono::microseconds(100);
constexpr int kBits = 20;           // of a chunk's number
constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

void pause(int& spins) {
    if (++spins % kSpins == 0) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Chunks [begin, end) of a thread's share.  The phase in the same word keeps a late thread from
// taking a chunk of a phase whose function it has not seen.
uint64_t share(uint64_t phase, uint64_t begin, uint64_t end) {
    return phase << (2 * kBits) | begin << kBits | end;
}

struct alignas(64) Share {
    std::atomic<uint64_t> word{0};

    // The owner takes from the front, others from the back: one stream stays one stream.
    int64_t take(uint64_t phase, bool front) {
        uint64_t seen = word.load(std::memory_order_acquire);
        for (;;) {
            const uint64_t begin = seen >> kBits & kMask, end = seen & kMask;
            if (seen != share(phase, begin, end) || begin >= end) return -1;
            const uint64_t left = front ? share(phase, begin + 1, end) : share(phase, begin, end - 1);
            if (word.compare_exchange_weak(seen, left, std::memory_order_acq_rel))
                return static_cast<int64_t>(front ? begin : end - 1);
        }
    }
};

}  // namespace

class Pool {
public:
    using Function = Team::Function;

    // Starts what is missing; fewer threads where the system gives no more.
    int open(int threads) {
        threads = threads < kMostThreads ? threads : kMostThreads;
        try {
            for (; workers_ < threads - 1; workers_++) {
                std::thread worker(&Pool::work, this, workers_ + 1);
                handles_[workers_] = worker.native_handle();
                worker.detach();
                fresh_ = true;
            }
        } catch (const std::exception&) {  // of no threads, or no memory
            threads = workers_ + 1;
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            active_.store(threads, std::memory_order_release);
            if (asleep_ == 0 && !fresh_) return threads;
        }
        keep_apart();
        fresh_ = false;
        wake_.notify_all();
        return threads;
    }

    void close() {
        const std::lock_guard<std::mutex> lock(mutex_);
        active_.store(0, std::memory_order_release);
    }

    void run(int threads, int64_t count, int64_t longest, Function function, const void* body) {
        const int64_t wanted = (count + threads * kChunksEach - 1) / (threads * kChunksEach);
        int64_t size = wanted < longest ? wanted : longest;
        while ((count + size - 1) / size > static_cast<int64_t>(kMask)) size *= 2;
        const int64_t chunks = (count + size - 1) / size;
        const uint64_t phase = (phase_.load(std::memory_order_relaxed) + 1) & kPhases;
        function_.store(function, std::memory_order_relaxed);
        body_.store(body, std::memory_order_relaxed);
        count_.store(count, std::memory_order_relaxed);
        size_.store(size, std::memory_order_relaxed);
        pending_.store(chunks, std::memory_order_relaxed);
        threads_.store(threads, std::memory_order_relaxed);
        for (int t = 0; t < threads; t++)
            shares_[t].word.store(share(phase, chunks * t / threads, chunks * (t + 1) / threads),
                                  std::memory_order_release);
        phase_.store(phase, std::memory_order_release);
        help(0, phase);
        for (int spins = 0; pending_.load(std::memory_order_acquire) != 0;) pause(spins);
    }

private:
    static constexpr uint64_t kPhases = (uint64_t{1} << (64 - 2 * kBits)) - 1;

    void work(int index) {
        for (;;) {
            if (!linger(index)) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_++;
                wake_.wait(lock, [&] { return active_.load() > index; });
                asleep_--;
            }
            uint64_t done = 0;
            int spins = 0;
            while (active_.load(std::memory_order_acquire) > index) {
                const uint64_t phase = phase_.load(std::memory_order_acquire);
                if (phase == done) {
                    pause(spins);
                    continue;
                }
                help(index, phase);
                done = phase;
            }
        }
    }

    // Lets workers run where the caller may, but for the core where it is, where some kernels would
    // have them wait until it has finished the call alone.
    void keep_apart() {
#if defined(__linux__) && !defined(__ANDROID__)  // which has no pthread_setaffinity_np
        constexpr int kFewCores = 16;  // on more, others are idle, and to move all takes longer
        const int core = sched_getcpu();
        cpu_set_t cores;
        if (core < 0 || sched_getaffinity(0, sizeof cores, &cores) != 0) return;
        const int count = CPU_COUNT(&cores);
        if (count > 1 && count <= kFewCores) CPU_CLR(core, &cores);
        if (!fresh_ && CPU_EQUAL(&cores, &cores_)) return;
        for (int i = 0; i < workers_; i++)
            pthread_setaffinity_np(handles_[i], sizeof cores, &cores);
        cores_ = cores;
#endif
    }

    // Waits a little for the next call, whenever nobody else wants the core.  Without the mutex,
    // which the caller may hold still: to wait for it is to sleep.
    bool linger(int index) const {
        const auto end = std::chrono::steady_clock::now() + kLinger;
        do {
            if (active_.load(std::memory_order_acquire) > index) return true;
            sched_yield();
        } while (std::chrono::steady_clock::now() < end);
        return false;
    }

    // Takes chunks of `phase` until none is left.  What is read before a chunk is taken belongs to
    // `phase` or to a later one; in the latter case no chunk of `phase` is left to take.  A call has
    // memory for its own threads only.
    void help(int index, uint64_t phase) {
        const Function function = function_.load(std::memory_order_relaxed);
        const void* body = body_.load(std::memory_order_relaxed);
        const int64_t count = count_.load(std::memory_order_relaxed);
        const int64_t size = size_.load(std::memory_order_relaxed);
        const int threads = threads_.load(std::memory_order_relaxed);
        if (index >= threads) return;  // late, for a call that is over
        int64_t done = 0;
        for (int i = 0; i < threads; i++) {
            Share& from = shares_[(index + i) % threads];
            for (int64_t chunk; (chunk = from.take(phase, i == 0)) >= 0; done++) {
                const int64_t begin = chunk * size, end = begin + size;
                function(body, {begin, end < count ? end : count, index, done == 0});
            }
        }
        // Once: others have to fetch what is changed here.
        if (done > 0) pending_.fetch_sub(done, std::memory_order_release);
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> active_{0};  // threads of the call that is going on
    int asleep_ = 0;              // workers that wait, as the mutex guards it
    // Changed by the call that holds the pool:
    int workers_ = 0;
    bool fresh_ = false;  // some have been started since they were last told where to run
    std::thread::native_handle_type handles_[kMostThreads] = {};
#if defined(__linux__) && !defined(__ANDROID__)
    cpu_set_t cores_ = {};  // where they run
#endif
    // A line that changes once a phase, and one that every thread changes.
    alignas(64) std::atomic<uint64_t> phase_{0};
    std::atomic<Function> function_{nullptr};
    std::atomic<const void*> body_{nullptr};
    std::atomic<int64_t> count_{0}, size_{1};
    std::atomic<int> threads_{0};
    alignas(64) std::atomic<int64_t> pending_{0};
    Share shares_[kMostThreads];
};

namespace {

std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> taken{false};

void forget() {
    the_pool.store(nullptr);
    taken.store(false);
}

// As soon as the library is loaded, so that no fork comes before it.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget);

// Called by the one that has `taken` the pool.
Pool* pool() {
    if (the_pool.load() == nullptr) the_pool.store(new (std::nothrow) Pool);
    return the_pool.load();
}

}  // namespace

Team::Team(int threads) {
    if (threads < 2 || taken.exchange(true)) return;
    pool_ = pool();
    if (pool_ == nullptr) taken.store(false);
    else threads_ = pool_->open(threads);
}

Team::~Team() {
    if (pool_ == nullptr) return;
    pool_->close();
    taken.store(false);
}

void Team::run(int64_t count, int64_t longest, Function function, const void* body) {
    if (count <= 0) return;
    if (pool_ != nullptr && threads_ > 1 && count > 1) {
        pool_->run(threads_, count, longest, function, body);
        return;
    }
    for (int64_t begin = 0; begin < count; begin += longest)
        function(body, {begin, begin + longest < count ? begin + longest : count, 0, begin == 0});
}

}  // namespace zk
