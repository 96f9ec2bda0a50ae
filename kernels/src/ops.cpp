#include "ops.h"

#include <cstring>

namespace zk {
namespace {

constexpr int64_t kAlone = 16 << 10;  // bytes of weights that are not worth a second thread

constexpr int64_t some_tiles(int64_t left) { return left < kTogether ? left : kTogether; }

// body(tile, tiles, start, count) for as many tiles at a time as multiply takes, and rows in
// handfuls.
template <typename Body>
void in_handfuls(int64_t begin, int64_t end, int64_t count, Body body) {
    for (int64_t tile = begin; tile < end; tile += kTogether)
        for (int64_t start = 0; start < count; start += kRows)
            body(tile, some_tiles(end - tile), start, std::min(kRows, count - start));
}

// body(row, first, lanes, values) for each row of each tile's part of the result: `lanes` columns
// from `first` on.
template <typename Body>
void each_row(int64_t width, int64_t tile, int64_t count_of_tiles, int64_t rows, const float* part,
              Body body) {
    for (int64_t t = 0; t < count_of_tiles; t++) {
        const int64_t first = (tile + t) * kTile;
        const int64_t lanes = std::min<int64_t>(kTile, width - first);
        for (int64_t i = 0; i < rows; i++, part += kTile) body(i, first, lanes, part);
    }
}

// silu(gate x) * up x of a run's rows, for some tiles: hidden [rows, width].
void gate_up(const Kernels& kernels, bool fast, const Run& run, int64_t begin, int64_t end,
             int64_t origin, const Rows& rows, float* hidden, int64_t width) {
    // Few rows: many tiles of gate, then the same of up.  Many rows: weights matter less.
    alignas(kLine) float gate[kTogether * kRows * kTile], up[kTogether * kRows * kTile];
    const int64_t count = run.end - run.begin, first = run.begin - origin;
    const int64_t group = count <= kFewRows ? kTiles : kTogether;
    for (; begin < end; begin += group) {
        const int64_t stop = std::min(begin + group, end);
        for (int64_t start = 0; start < count; start += kRows) {
            const int64_t some = std::min(kRows, count - start), at = first + start;
            for (int64_t tile = begin; tile < stop; tile += kTogether)
                kernels.multiply(*run.gate, tile, some_tiles(stop - tile), fast, rows, at,
                                 some, gate + (tile - begin) * some * kTile);
            for (int64_t tile = begin; tile < stop; tile += kTogether) {
                const int64_t taken = some_tiles(stop - tile);
                float* own = gate + (tile - begin) * some * kTile;
                kernels.multiply(*run.up, tile, taken, fast, rows, at, some, up);
                kernels.swiglu(own, up, taken * some);
                each_row(width, tile, taken, some, own,
                         [&](int64_t i, int64_t column, int64_t lanes, const float* from) {
                             std::memcpy(hidden + (at + i) * width + column, from, 4 * lanes);
                         });
            }
        }
    }
}

void down(const Kernels& kernels, bool fast, const Run& run, int64_t begin, int64_t end,
          int64_t origin, const Rows& rows, const int64_t* order, const float* weights,
          float* out) {
    const int64_t count = run.end - run.begin, width = run.down->rows;
    in_handfuls(begin, end, count, [&](int64_t tile, int64_t taken, int64_t start, int64_t some) {
        alignas(kLine) float part[kTogether * kRows * kTile];
        const int64_t at = run.begin - origin + start;
        kernels.multiply(*run.down, tile, taken, fast, rows, at, some, part);
        each_row(width, tile, taken, some, part,
                 [&](int64_t i, int64_t first, int64_t lanes, const float* from) {
                     const int64_t row = order[run.begin + start + i];
                     for (int64_t lane = 0; lane < lanes; lane++)
                         out[row * width + first + lane] = from[lane] * weights[row];
                 });
    });
}

}  // namespace

int threads_for(const Options& options, int64_t bytes) {
    return bytes <= kAlone ? 1 : options.threads;
}

void linear(Team& team, Scratch& scratch, const Matrix& matrix, const float* x, int64_t count,
            const float* bias, float* out, const Options& options) {
    const Kernels kernels = kernels_of(options.isa);
    const bool fast = options.fast != 0;
    const int64_t columns = matrix.columns;
    const Inputs inputs(team, kernels, fast,
                        scratch.take(inputs_bytes(team, count, columns, fast)), columns, count,
                        [&](int64_t i) { return x + i * columns; });
    team.run(tiles(matrix), kAnything, [&](const Range& range) {
        const Rows rows = inputs.of(range);
        in_handfuls(range.begin, range.end, count,
                    [&](int64_t tile, int64_t taken, int64_t start, int64_t some) {
            alignas(kLine) float part[kTogether * kRows * kTile];
            kernels.multiply(matrix, tile, taken, fast, rows, start, some, part);
            each_row(matrix.rows, tile, taken, some, part,
                     [&](int64_t i, int64_t first, int64_t lanes, const float* from) {
                         float* target = out + (start + i) * matrix.rows + first;
                         for (int64_t lane = 0; lane < lanes; lane++)
                             target[lane] = from[lane] + (bias ? bias[first + lane] : 0.0f);
                     });
        });
    });
}

void moe_ffn(Team& team, Scratch& scratch, const Experts& experts, const float* x,
             const float* weights, float* out, const Options& options) {
    const Kernels kernels = kernels_of(options.isa);
    const bool fast = options.fast != 0;
    const Matrix &gate = *experts.runs[0].gate, &last = *experts.runs[0].down;
    const int64_t count = experts.rows(), origin = experts.first(), columns = gate.columns;
    const int64_t width = tiles(gate) * kTile;
    const int64_t input_bytes = inputs_bytes(team, count, columns, fast);
    const int64_t hidden_bytes = aligned(4 * count * width);
    char* memory = scratch.take(input_bytes + hidden_bytes +
                                inputs_bytes(team, count, last.columns, fast));
    float* hidden = reinterpret_cast<float*>(memory + input_bytes);

    const Inputs inputs(team, kernels, fast, memory, columns, count,
                        [&](int64_t i) { return x + experts.order[origin + i] * columns; });
    team.run(experts.count * tiles(gate), kAnything, [&](const Range& range) {
        const Rows rows = inputs.of(range);
        split(range, tiles(gate), [&](int64_t run, int64_t begin, int64_t end) {
            gate_up(kernels, fast, experts.runs[run], begin, end, origin, rows, hidden, width);
        });
    });
    const Inputs middle(team, kernels, fast, memory + input_bytes + hidden_bytes, last.columns,
                        count, [&](int64_t i) { return hidden + i * width; });
    team.run(experts.count * tiles(last), kAnything, [&](const Range& range) {
        const Rows rows = middle.of(range);
        split(range, tiles(last), [&](int64_t run, int64_t begin, int64_t end) {
            down(kernels, fast, experts.runs[run], begin, end, origin, rows, experts.order, weights,
                 out);
        });
    });
}

}  // namespace zk
