// Entry points: packing, and the ops in terms of tiles.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "isa.h"
#include "layout.h"
#include "pool.h"
#include "zaya_kernels.h"

namespace zk {
namespace {

constexpr int64_t kRows = 64;               // of activations that meet a tile at once
constexpr int64_t kTiles = 16;              // of gate before the same of up: two long streams
constexpr int64_t kAlone = 16 << 10;        // bytes of weights that are not worth a second thread
constexpr int64_t kAnything = int64_t{1} << 40;
constexpr int64_t kFewRows = 4;             // are prepared faster than shared out

int32_t best_isa() {
#if defined(ZK_X86_KERNELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return kAvx512;
    if (avx2) return kAvx2;
#endif
    return kBase;
}

// ---- scratch memory ------------------------------------------------------------------------------

// Kept by a thread from call to call: fresh pages would cost more than many a product.
class Scratch {
public:
    ~Scratch() { std::free(memory_); }

    char* take(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
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

thread_local Scratch scratch;

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t rows_bytes(int64_t count, int64_t columns, bool fast) {
    const int64_t numbers = count * padded(columns);
    const int64_t bytes = fast ? numbers / kBlock * static_cast<int64_t>(sizeof(Block)) : 4 * numbers;
    return aligned(bytes);
}

Rows place_rows(char* memory, int64_t columns, bool fast) {
    float* values = fast ? nullptr : reinterpret_cast<float*>(memory);
    Block* blocks = fast ? reinterpret_cast<Block*>(memory) : nullptr;
    return {values, blocks, padded(columns)};
}

// ---- the ops -------------------------------------------------------------------------------------

// source(i) points to the i-th of `count` rows of floats.
template <typename Source>
void prepare(Team& team, const Kernels& kernels, bool fast, const Rows& rows, int64_t columns,
             int64_t count, Source source) {
    const auto body = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            kernels.prepare(source(i), columns, fast, rows, i);
    };
    if (count <= kFewRows) body(0, count);
    else team.run(count, kAnything, body);
}

int threads_for(const Options& options, int64_t bytes) {
    return bytes <= kAlone ? 1 : options.threads;
}

// body(tile, tiles, start, count) for two tiles at a time, or one, and rows in handfuls.
template <typename Body>
void in_pairs(int64_t begin, int64_t end, int64_t count, Body body) {
    for (int64_t tile = begin; tile < end; tile += 2)
        for (int64_t start = 0; start < count; start += kRows)
            body(tile, std::min<int64_t>(2, end - tile), start, std::min(kRows, count - start));
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

void linear(const Matrix& matrix, const float* x, int64_t count, const float* bias, float* out,
            const Options& options) {
    const Kernels kernels = kernels_of(options.isa);
    const bool fast = options.fast != 0;
    const int64_t columns = matrix.columns;
    const Rows rows = place_rows(scratch.take(rows_bytes(count, columns, fast)), columns, fast);
    Team team(threads_for(options, tiles(matrix) * tile_bytes(matrix)));
    prepare(team, kernels, fast, rows, columns, count, [&](int64_t i) { return x + i * columns; });
    team.run(tiles(matrix), kAnything, [&](int64_t begin, int64_t end) {
        in_pairs(begin, end, count, [&](int64_t tile, int64_t pair, int64_t start, int64_t some) {
            alignas(64) float part[2 * kRows * kTile];
            kernels.multiply(matrix, tile, pair, fast, rows, start, some, part);
            each_row(matrix.rows, tile, pair, some, part,
                     [&](int64_t i, int64_t first, int64_t lanes, const float* from) {
                         float* target = out + (start + i) * matrix.rows + first;
                         for (int64_t lane = 0; lane < lanes; lane++)
                             target[lane] = from[lane] + (bias ? bias[first + lane] : 0.0f);
                     });
        });
    });
}

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

// silu(gate x) * up x of a run's rows, for some tiles: hidden [rows, width].
void gate_up(const Kernels& kernels, bool fast, const Run& run, int64_t begin, int64_t end,
             int64_t origin, const Rows& rows, float* hidden, int64_t width) {
    // Few rows: many tiles of gate, then the same of up.  Many rows: weights matter less.
    alignas(64) float gate[2 * kRows * kTile], up[2 * kRows * kTile];
    const int64_t count = run.end - run.begin, first = run.begin - origin;
    const int64_t group = count <= kFewRows ? kTiles : 2;
    for (; begin < end; begin += group) {
        const int64_t stop = std::min(begin + group, end);
        for (int64_t start = 0; start < count; start += kRows) {
            const int64_t some = std::min(kRows, count - start), at = first + start;
            for (int64_t tile = begin; tile < stop; tile += 2)
                kernels.multiply(run.gate, tile, std::min<int64_t>(2, stop - tile), fast, rows, at,
                                 some, gate + (tile - begin) * some * kTile);
            for (int64_t tile = begin; tile < stop; tile += 2) {
                const int64_t pair = std::min<int64_t>(2, stop - tile);
                float* own = gate + (tile - begin) * some * kTile;
                kernels.multiply(run.up, tile, pair, fast, rows, at, some, up);
                kernels.swiglu(own, up, pair * some);
                each_row(width, tile, pair, some, own,
                         [&](int64_t i, int64_t column, int64_t lanes, const float* from) {
                             std::memcpy(hidden + (at + i) * width + column, from, 4 * lanes);
                         });
            }
        }
    }
}
static_assert(kTiles * kFewRows <= 2 * kRows, "gate holds either");

void down(const Kernels& kernels, bool fast, const Run& run, int64_t begin, int64_t end,
          int64_t origin, const Rows& rows, const int64_t* order, const float* weights,
          float* out) {
    const int64_t count = run.end - run.begin, width = run.down.rows;
    in_pairs(begin, end, count, [&](int64_t tile, int64_t pair, int64_t start, int64_t some) {
        alignas(64) float part[2 * kRows * kTile];
        const int64_t at = run.begin - origin + start;
        kernels.multiply(run.down, tile, pair, fast, rows, at, some, part);
        each_row(width, tile, pair, some, part,
                 [&](int64_t i, int64_t first, int64_t lanes, const float* from) {
                     const int64_t row = order[run.begin + start + i];
                     for (int64_t lane = 0; lane < lanes; lane++)
                         out[row * width + first + lane] = from[lane] * weights[row];
                 });
    });
}

void moe_ffn(const Experts& experts, const float* x, const float* weights, float* out,
             const Options& options) {
    const Kernels kernels = kernels_of(options.isa);
    const bool fast = options.fast != 0;
    const Matrix &gate = experts.runs[0].gate, &last = experts.runs[0].down;
    const int64_t count = experts.rows(), origin = experts.first(), columns = gate.columns;
    const int64_t width = tiles(gate) * kTile;
    const int64_t input_bytes = rows_bytes(count, columns, fast);
    const int64_t hidden_bytes = aligned(4 * count * width);
    char* memory = scratch.take(input_bytes + hidden_bytes +
                                rows_bytes(count, last.columns, fast));
    const Rows inputs = place_rows(memory, columns, fast);
    float* hidden = reinterpret_cast<float*>(memory + input_bytes);
    const Rows middle = place_rows(memory + input_bytes + hidden_bytes, last.columns, fast);

    Team team(threads_for(options, experts.count * tiles(gate) * tile_bytes(gate)));
    prepare(team, kernels, fast, inputs, columns, count,
            [&](int64_t i) { return x + experts.order[origin + i] * columns; });
    team.run(experts.count * tiles(gate), kAnything, [&](int64_t begin, int64_t end) {
        experts.split(begin, end, tiles(gate), [&](const Run& run, int64_t from, int64_t to) {
            gate_up(kernels, fast, run, from, to, origin, inputs, hidden, width);
        });
    });
    prepare(team, kernels, fast, middle, last.columns, count,
            [&](int64_t i) { return hidden + i * width; });
    team.run(experts.count * tiles(last), kAnything, [&](int64_t begin, int64_t end) {
        experts.split(begin, end, tiles(last), [&](const Run& run, int64_t from, int64_t to) {
            down(kernels, fast, run, from, to, origin, middle, experts.order, weights, out);
        });
    });
}

// ---- packing -------------------------------------------------------------------------------------

void pack_row(const Matrix& m, const int8_t* codes, const char* scales, int64_t row) {
    uint8_t* tile = m.data + row / kTile * tile_bytes(m);
    const int64_t lane = row % kTile, groups = ceil_div(m.columns, m.group);
    const int64_t size = scale_bytes(m.scale_type), own = kPanel / m.group;
    for (int64_t start = 0; start < m.columns; start += kPanel, tile += panel_bytes(m)) {
        const int64_t end = std::min<int64_t>(kPanel, m.columns - start);
        uint32_t* words = reinterpret_cast<uint32_t*>(tile) + lane;
        for (int64_t i = 0; i < end; i++) {
            // The offset is there already: adding a code to it is flipping its highest bit.
            const uint32_t code = static_cast<uint8_t>(codes[row * m.columns + start + i]);
            const uint32_t bits = m.bits == 4 ? code & 15u : code;
            words[code_word(m.bits, i) * kTile] ^= bits << code_shift(m.bits, i);
        }
        uint8_t* target = tile + kBlocks * block_bytes(m.bits);
        for (int64_t g = 0; g < own && start / m.group + g < groups; g++)
            std::memcpy(target + (g * kTile + lane) * size,
                        scales + (row * groups + start / m.group + g) * size, size);
    }
}

void pack_tile(const Matrix& m, const int8_t* codes, const char* scales, int64_t tile) {
    uint8_t* panel = m.data + tile * tile_bytes(m);
    for (int64_t i = 0; i < panels(m); i++, panel += panel_bytes(m)) {
        std::memset(panel, m.bits == 4 ? 0x88 : 0x80, kBlocks * block_bytes(m.bits));
        std::memset(panel + kBlocks * block_bytes(m.bits), 0,
                    panel_bytes(m) - kBlocks * block_bytes(m.bits));
    }
    for (int64_t row = tile * kTile; row < std::min(m.rows, (tile + 1) * kTile); row++)
        pack_row(m, codes, scales, row);
}

float read_scale(const uint8_t* from, int32_t type) {
    uint32_t bits = 0;
    float value;
    std::memcpy(&bits, from, scale_bytes(type));
    if (type == kBFloat16) bits <<= 16;
    const uint32_t magnitude = (bits & 0x7FFFu) << 13;
    std::memcpy(&value, type == kFloat16 ? &magnitude : &bits, 4);
    if (type != kFloat16) return value;
    return (bits & 0x8000u ? -value : value) * 0x1p112f;
}

void unpack_row(const Matrix& m, int64_t row, float* out) {
    const uint8_t* tile = m.data + row / kTile * tile_bytes(m);
    const int64_t lane = row % kTile, size = scale_bytes(m.scale_type);
    const uint32_t mask = (1u << m.bits) - 1;
    for (int64_t start = 0; start < m.columns; start += kPanel, tile += panel_bytes(m)) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(tile) + lane;
        const uint8_t* scales = tile + kBlocks * block_bytes(m.bits);
        for (int64_t i = 0; i < std::min<int64_t>(kPanel, m.columns - start); i++) {
            const uint32_t word = words[code_word(m.bits, i) * kTile];
            const int32_t code = static_cast<int32_t>(word >> code_shift(m.bits, i) & mask);
            const float scale =
                read_scale(scales + (i / m.group * kTile + lane) * size, m.scale_type);
            out[start + i] = static_cast<float>(code - (1 << (m.bits - 1))) * scale;
        }
    }
}

}  // namespace
}  // namespace zk

// Raised with every change of a signature, a struct or the layout; native.py refuses another one.
ZK_EXPORT int32_t zk_abi_version() { return 1; }

ZK_EXPORT int32_t zk_best_isa() { return zk::best_isa(); }

// Bytes that `data` must have room for; whatever it points to is not looked at.
ZK_EXPORT int64_t zk_packed_bytes(const zk::Matrix* matrix) {
    return zk::tiles(*matrix) * zk::tile_bytes(*matrix);
}

// codes [rows, columns] int8, scales [rows, groups] of the scale type, into matrix->data.
ZK_EXPORT void zk_pack(const zk::Matrix* matrix, const int8_t* codes, const void* scales,
                       int32_t threads) {
    zk::Team team(threads);
    team.run(zk::tiles(*matrix), zk::kAnything, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; tile++)
            zk::pack_tile(*matrix, codes, static_cast<const char*>(scales), tile);
    });
}

// The given rows as floats [count, columns].
ZK_EXPORT void zk_unpack_rows(const zk::Matrix* matrix, const int64_t* rows, int64_t count,
                              float* out) {
    for (int64_t i = 0; i < count; i++)
        zk::unpack_row(*matrix, rows[i], out + i * matrix->columns);
}

// Reads bytes, a multiple of 64, as the kernels do, and nothing else: what benchmarks divide by.
ZK_EXPORT uint64_t zk_read(const void* data, int64_t bytes, int32_t threads) {
    typedef uint64_t Line __attribute__((vector_size(64)));
    std::atomic<uint64_t> result{0};
    zk::Team team(threads);
    team.run(bytes / 64, zk::kAnything, [&](int64_t begin, int64_t end) {
        Line sum[2] = {};
        const char* from = static_cast<const char*>(data);
        for (int64_t i = begin; i < end; i++) {
            Line line;
            std::memcpy(&line, from + 64 * i, sizeof line);
            sum[i % 2] ^= line;
        }
        const Line both = sum[0] ^ sum[1];
        for (int lane = 0; lane < 8; lane++) result ^= both[lane];
    });
    return result;
}

// out [count, rows] = x [count, columns] @ matrix^T + bias, which may be null.
ZK_EXPORT int32_t zk_linear(const zk::Matrix* matrix, const float* x, int64_t count,
                            const float* bias, float* out, const zk::Options* options) {
    try {
        zk::linear(*matrix, x, count, bias, out, *options);
        zk::scratch.trim();
    } catch (const std::bad_alloc&) {
        return zk::kNoMemory;
    }
    return zk::kOk;
}

// For every row r = order[i] of a run: out[r] = down(silu(gate x[r]) * up x[r]) * weights[r].
// Runs follow each other without gaps, are not empty and have matrices of the same shapes.  Other
// rows of out are left alone.
ZK_EXPORT int32_t zk_moe_ffn(const zk::Run* runs, int64_t count, const int64_t* order,
                             const float* x, const float* weights, float* out,
                             const zk::Options* options) {
    if (count == 0) return zk::kOk;
    try {
        zk::moe_ffn({runs, count, order}, x, weights, out, *options);
        zk::scratch.trim();
    } catch (const std::bad_alloc&) {
        return zk::kNoMemory;
    }
    return zk::kOk;
}
