// The ops in terms of tiles.
//
// They take the Team that computes, so that several of them can share one wake-up, and memory for
// intermediate values, which no other op may use meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "isa.h"
#include "layout.h"
#include "pool.h"
#include "zaya_kernels.h"

namespace zk {

constexpr int64_t kAnything = int64_t{1} << 40;  // no bound on the ranges of Team::run

// How products walk, here and in the decode step.
constexpr int64_t kRows = 64;    // of activations that meet a tile at once
constexpr int64_t kTiles = 16;   // of gate before the same of up: two long streams
constexpr int64_t kFewRows = 4;  // for which that pays
static_assert(kTiles * kFewRows <= kTogether * kRows, "buffers of kTogether * kRows hold either");

// Memory of one op at a time, kept from call to call: fresh pages would cost more than many a
// product.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    char* take(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<char*>(std::aligned_alloc(kLine, aligned(bytes)));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

    // Not for ever, after an uncommonly long prompt.
    void trim() {
        constexpr int64_t kKept = 64 << 20;
        if (size_ <= kKept) return;
        std::free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }

private:
    char* memory_ = nullptr;
    int64_t size_ = 0;
};

// ---- activations ---------------------------------------------------------------------------------

constexpr int64_t kOwnRows = 4;  // of which every thread prepares a copy of its own, at most
constexpr bool each_prepares(int64_t count) { return count <= kOwnRows; }

constexpr int64_t rows_bytes(int64_t count, int64_t columns, bool fast) {
    return count * padded(columns) / kBlock * block_bytes(fast);
}

// Memory that `count` rows take, or any smaller number of them.
inline int64_t inputs_bytes(const Team& team, int64_t count, int64_t columns, bool fast) {
    const int64_t own = rows_bytes(std::min(count, kOwnRows), columns, fast) * team.threads();
    return std::max(own, rows_bytes(count, columns, fast));
}

// Rows of activations as kernels read them.  A few are prepared by every thread for itself, in less
// time than it takes to fetch what another core has written; more are shared out.
//   source(i) points to the i-th of `count` rows of floats.
template <typename Source>
class Inputs {
public:
    Inputs(Team& team, const Kernels& kernels, bool fast, char* memory, int64_t columns,
           int64_t count, Source source)
        : kernels_(kernels), fast_(fast), memory_(memory), columns_(columns), count_(count),
          source_(source) {
        if (each_prepares(count)) return;
        team.run(count, kAnything,
                 [&](int64_t begin, int64_t end) { prepare(rows(0), begin, end); });
    }

    // For one range after the other of a run.
    Rows of(const Range& range) const {
        if (!each_prepares(count_)) return rows(0);
        const Rows own = rows(range.thread);
        if (range.first) prepare(own, 0, count_);
        return own;
    }

private:
    Rows rows(int copy) const {
        return {memory_ + copy * rows_bytes(count_, columns_, fast_), padded(columns_)};
    }
    void prepare(const Rows& rows, int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; i++)
            kernels_.prepare(source_(i), columns_, fast_, rows, i);
    }

    const Kernels& kernels_;
    const bool fast_;
    char* const memory_;
    const int64_t columns_, count_;
    const Source source_;
};

// ---- ops -----------------------------------------------------------------------------------------

// body(matrix, begin, end) for the parts of a range of the tiles of several matrices, `each` of them
// a matrix.
template <typename Body>
void split(const Range& range, int64_t each, Body body) {
    for (int64_t begin = range.begin; begin < range.end;) {
        const int64_t matrix = begin / each, stop = std::min(range.end, (matrix + 1) * each);
        body(matrix, begin - matrix * each, stop - matrix * each);
        begin = stop;
    }
}

// How many threads weights of so many bytes are worth.
int threads_for(const Options& options, int64_t bytes);

// out [count, matrix.rows] = x [count, matrix.columns] @ matrix^T + bias, which may be null.
void linear(Team& team, Scratch& scratch, const Matrix& matrix, const float* x, int64_t count,
            const float* bias, float* out, const Options& options);

// The rows of all runs, one run after the other.
struct Experts {
    const Run* runs;
    int64_t count;
    const int64_t* order;

    int64_t first() const { return runs[0].begin; }
    int64_t rows() const { return runs[count - 1].end - runs[0].begin; }
};

// For every row r = order[i] of a run: out[r] = down(silu(gate x[r]) * up x[r]) * weights[r].
void moe_ffn(Team& team, Scratch& scratch, const Experts& experts, const float* x,
             const float* weights, float* out, const Options& options);

}  // namespace zk
