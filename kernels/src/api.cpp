// Entry points, and packing.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

#include "layout.h"
#include "ops.h"
#include "pool.h"
#include "zaya_kernels.h"

namespace zk {
namespace {

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

thread_local Scratch scratch;

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
ZK_EXPORT int32_t zk_abi_version() { return 2; }

ZK_EXPORT int32_t zk_best_isa() { return zk::best_isa(); }

// Bytes that `data` must have room for; whatever it points to is not looked at.
ZK_EXPORT int64_t zk_packed_bytes(const zk::Matrix* matrix) {
    return zk::packed_bytes(*matrix);
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
        zk::Team team(zk::threads_for(*options, zk::packed_bytes(*matrix)));
        zk::linear(team, zk::scratch, *matrix, x, count, bias, out, *options);
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
        const int64_t bytes = count * zk::packed_bytes(runs[0].gate);
        zk::Team team(zk::threads_for(*options, bytes));
        zk::moe_ffn(team, zk::scratch, {runs, count, order}, x, weights, out, *options);
        zk::scratch.trim();
    } catch (const std::bad_alloc&) {
        return zk::kNoMemory;
    }
    return zk::kOk;
}
