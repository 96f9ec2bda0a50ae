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

// Bytes of `count` rows as kernels read them, and the rows that lie there.
int64_t rows_bytes(int64_t count, int64_t columns, bool fast);
Rows place_rows(char* memory, int64_t columns);

// Fills rows; source(i) points to the i-th of `count` rows of floats.
template <typename Source>
void prepare(Team& team, const Kernels& kernels, bool fast, const Rows& rows, int64_t columns,
             int64_t count, Source source) {
    constexpr int64_t kFew = 4;  // are prepared faster than shared out
    const auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            kernels.prepare(source(i), columns, fast, rows, i);
    };
    if (count <= kFew) body(0, count);
    else team.run(count, kAnything, body);
}

// ---- ops -----------------------------------------------------------------------------------------

// How many threads weights of so many bytes are worth.
int threads_for(const Options& options, int64_t bytes);

// out [count, matrix.rows] = rows @ matrix^T + bias, which may be null.  `rows` may be prepared
// once for several matrices.
void product(Team& team, const Kernels& kernels, bool fast, const Matrix& matrix, const Rows& rows,
             int64_t count, const float* bias, float* out);

// The same of x [count, matrix.columns].
void linear(Team& team, Scratch& scratch, const Matrix& matrix, const float* x, int64_t count,
            const float* bias, float* out, const Options& options);

// The rows of all runs, one run after the other.
struct Experts {
    const Run* runs;
    int64_t count;
    const int64_t* order;

    int64_t first() const { return runs[0].begin; }
    int64_t rows() const { return runs[count - 1].end - runs[0].begin; }

    // body(run, begin, end) for the parts of a range of tiles, `each` of them a run.
    template <typename Body>
    void split(int64_t begin, int64_t end, int64_t each, Body body) const {
        while (begin < end) {
            const int64_t run = begin / each, stop = std::min(end, (run + 1) * each);
            body(runs[run], begin - run * each, stop - run * each);
            begin = stop;
        }
    }
};

// For every row r = order[i] of a run: out[r] = down(silu(gate x[r]) * up x[r]) * weights[r].
void moe_ffn(Team& team, Scratch& scratch, const Experts& experts, const float* x,
             const float* weights, float* out, const Options& options);

}  // namespace zk
