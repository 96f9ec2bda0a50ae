// Entry points, and packing.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

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
#elif defined(ZK_ARM_KERNELS) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return kDotProduct;
#elif defined(ZK_ARM_KERNELS) && defined(__APPLE__)
    return kDotProduct;  // every Mac with an ARM processor
#endif
    return kBase;
}

thread_local Scratch scratch;

// Large pages are read faster; where there are none nothing is lost.
void ask_for_large_pages(uint8_t* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % page);
    madvise(data - before, (bytes + before + page - 1) / page * page, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// ---- packing -------------------------------------------------------------------------------------

// One row, lane by lane: `put(target, source, bytes)` for every number beside the codes.
struct Row {
    const Matrix& m;
    const Source& from;
    int64_t row, lane, size;

    Row(const Matrix& matrix, const Source& source, int64_t index)
        : m(matrix), from(source), row(index), lane(index % kTile),
          size(number_bytes(matrix.scale_type)) {}

    // Columns [start, start + columns) of the padded row into the span that begins at `span`.
    void pack(uint8_t* span, int64_t start, int64_t columns) const {
        const Parts at = parts(m, columns);
        const int64_t end = std::min(start + columns, m.columns);
        uint32_t* words = reinterpret_cast<uint32_t*>(span + at.codes) + lane;
        for (int64_t i = start; i < end; i++) {
            const uint32_t code = static_cast<uint8_t>(from.codes[row * m.columns + i] + from.bias);
            const uint32_t bits = m.bits == 4 ? code & 15u : code;
            words[code_word(m.bits, i - start) * kTile] |= bits << code_shift(m.bits, i - start);
        }
        const int64_t groups = ceil_div(m.columns, from.group);
        for (int64_t i = start, own = lane; i < end; i += m.group, own += kTile) {
            const int64_t group = row * groups + i / from.group;
            std::memcpy(span + own * size, static_cast<const char*>(from.scales) + group * size, size);
            const uint8_t* offsets = static_cast<const uint8_t*>(from.offsets);
            if (m.form == kZeroPoints)
                span[at.offsets + own] = static_cast<uint8_t>(offsets[group] + from.bias);
            else if (m.form == kMinima)
                std::memcpy(span + at.offsets + own * size, offsets + group * size, size);
        }
        if (m.scale_type != kProduct) return;
        const int64_t outer_groups = ceil_div(m.columns, from.outer);
        uint16_t* scales = reinterpret_cast<uint16_t*>(span + at.outer_scales) + lane;
        uint16_t* minima = reinterpret_cast<uint16_t*>(span + at.outer_offsets) + lane;
        for (int64_t i = start; i < end; i += kPanel, scales += kTile, minima += kTile) {
            const int64_t group = row * outer_groups + i / from.outer;
            *scales = from.outer_scales[group];
            if (m.form == kMinima) *minima = from.outer_offsets[group];
        }
    }
};

void pack_tile(const Matrix& m, const Source& source, int64_t tile) {
    uint8_t* span = m.data + tile * tile_bytes(m);
    std::memset(span, 0, tile_bytes(m));
    for (int64_t start = 0; start < m.columns; start += kSpan) {
        const int64_t columns = span_columns(m, start);
        for (int64_t row = tile * kTile; row < std::min(m.rows, (tile + 1) * kTile); row++)
            Row(m, source, row).pack(span, start, columns);
        span += parts(m, columns).end;
    }
}

float read_number(const uint8_t* from, int32_t type) {
    uint32_t bits = 0;
    float value;
    std::memcpy(&bits, from, number_bytes(type));
    if (type == kProduct) return static_cast<int8_t>(bits);
    if (type == kBFloat16) bits <<= 16;
    const uint32_t magnitude = (bits & 0x7FFFu) << 13;
    std::memcpy(&value, type == kFloat16 ? &magnitude : &bits, 4);
    if (type != kFloat16) return value;
    value *= 0x1p112f;
    if ((bits & 0x7C00u) == 0x7C00u) value = bits & 0x3FFu ? __builtin_nanf("") : __builtin_inff();
    return bits & 0x8000u ? -value : value;
}

void unpack_row(const Matrix& m, int64_t row, float* out) {
    const uint8_t* span = m.data + row / kTile * tile_bytes(m);
    const int64_t lane = row % kTile, size = number_bytes(m.scale_type);
    const uint32_t mask = (1u << m.bits) - 1;
    const int center = m.bits == 8 ? 128 : m.form == kSymmetric ? 8 : 0;
    for (int64_t start = 0; start < m.columns; start += kSpan) {
        const int64_t columns = span_columns(m, start);
        const Parts at = parts(m, columns);
        const uint32_t* words = reinterpret_cast<const uint32_t*>(span + at.codes) + lane;
        for (int64_t i = 0; i < std::min(columns, m.columns - start); i++) {
            const uint32_t word = words[code_word(m.bits, i) * kTile];
            const int u = static_cast<int>(word >> code_shift(m.bits, i) & mask);
            const int64_t own = i / m.group * kTile + lane, outer = i / kPanel * kTile + lane;
            float scale = read_number(span + own * size, m.scale_type);
            if (m.scale_type == kProduct)
                scale *= read_number(span + at.outer_scales + outer * 2, kFloat16);
            float value = 0;
            switch (m.form) {
                case kLevels: value = kIq4Levels[u] * scale; break;
                case kZeroPoints: value = (u - span[at.offsets + own]) * scale; break;
                default: value = (u - center) * scale;
            }
            if (m.form == kMinima) {
                float minimum = read_number(span + at.offsets + own * size, m.scale_type);
                if (m.scale_type == kProduct)
                    minimum *= read_number(span + at.outer_offsets + outer * 2, kFloat16);
                value += minimum;
            }
            out[start + i] = value;
        }
        span += at.end;
    }
}

}  // namespace
}  // namespace zk

// Raised with every change of a signature or a struct; library.py refuses another one.
ZK_EXPORT int32_t zk_abi_version() { return 5; }

// Raised with every change of what packed bytes mean.
ZK_EXPORT int32_t zk_layout_version() { return zk::kLayoutVersion; }

ZK_EXPORT int32_t zk_best_isa() { return zk::best_isa(); }

// Bytes that `data` must have room for; whatever it points to is not looked at.
ZK_EXPORT int64_t zk_packed_bytes(const zk::Matrix* matrix) {
    return zk::packed_bytes(*matrix);
}

// Fills matrix->data.
ZK_EXPORT void zk_pack(const zk::Matrix* matrix, const zk::Source* source, int32_t threads) {
    zk::ask_for_large_pages(matrix->data, zk::packed_bytes(*matrix));
    zk::Team team(threads);
    team.run(zk::tiles(*matrix), zk::kAnything, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; tile++) zk::pack_tile(*matrix, *source, tile);
    });
}

// The given rows as floats [count, columns].
ZK_EXPORT void zk_unpack_rows(const zk::Matrix* matrix, const int64_t* rows, int64_t count,
                              float* out) {
    for (int64_t i = 0; i < count; i++)
        zk::unpack_row(*matrix, rows[i], out + i * matrix->columns);
}

// Reads whole lines of regions, one after the other as the kernels do, and nothing else: what
// benchmarks divide by.
ZK_EXPORT uint32_t zk_read(const zk::Region* regions, int64_t count, int32_t threads) {
    const zk::Kernels kernels = zk::kernels_of(zk::best_isa());
    std::atomic<uint32_t> result{0};
    int64_t lines = 0;
    for (int64_t i = 0; i < count; i++) lines += regions[i].bytes / zk::kLine;
    zk::Team team(threads);
    team.run(lines, zk::kAnything, [&](int64_t begin, int64_t end) {
        int64_t first = 0;  // line of the region
        for (const zk::Region* region = regions; first < end; region++) {
            const int64_t next = first + region->bytes / zk::kLine;
            const int64_t from = std::max(begin, first), to = std::min(end, next);
            const auto data = static_cast<const uint8_t*>(region->data);
            if (from < to) result ^= kernels.read(data + (from - first) * zk::kLine, to - from);
            first = next;
        }
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
        const int64_t bytes = count * zk::packed_bytes(*runs[0].gate);
        zk::Team team(zk::threads_for(*options, bytes));
        zk::moe_ffn(team, zk::scratch, {runs, count, order}, x, weights, out, *options);
        zk::scratch.trim();
    } catch (const std::bad_alloc&) {
        return zk::kNoMemory;
    }
    return zk::kOk;
}
