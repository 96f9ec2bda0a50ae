// Where the numbers of a packed matrix lie.
//
// A *tile* is 16 rows, the vector lanes of every kernel; tiles follow each other, so a thread that
// takes a range of tiles reads one sequential stream.  A tile is a sequence of *spans* of 1024
// columns (fewer in the last one, a multiple of 128), each of them, [16 rows] innermost:
//
//     scales   [span / group], of the scale type
//     offsets  [span / group], zero points or minima, where there are such
//     outer    [span / 128] float16 scales, then likewise for minima, where scales are products
//              up to here all is decoded into floats before a span is computed; then, on the next
//              multiple of 64 bytes,
//     codes    4 bits: [span / 8] words of eight codes: columns 0..3 in the low nibbles of the
//                      four bytes, columns 4..7 in the high ones
//              8 bits: [span / 4] words of four codes
//
// Codes are stored unsigned, which the dot product instructions of x86 want.  Rows and columns
// beyond the matrix have scales and minima of zero.
//
// kLayoutVersion names all this: files that keep packed matrices compare it.
#pragma once

#include <cstdint>

#include "zaya_kernels.h"

namespace zk {

constexpr int32_t kLayoutVersion = 2;

constexpr int kTile = 16;
constexpr int kBlock = 32;
constexpr int kPanel = 128;  // columns are padded to a multiple of it
constexpr int kSpan = 1024;
constexpr int kLine = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }

inline int64_t number_bytes(int32_t scale_type) {
    return scale_type == kFloat32 ? 4 : scale_type == kProduct ? 1 : 2;
}
constexpr int64_t padded(int64_t columns) { return ceil_div(columns, kPanel) * kPanel; }
inline int64_t tiles(const Matrix& m) { return ceil_div(m.rows, kTile); }

// Where the parts of a span of `columns` begin, in bytes from its beginning.
struct Parts {
    int64_t offsets, outer_scales, outer_offsets, codes, end;
};
inline Parts parts(const Matrix& m, int64_t columns) {
    const int64_t groups = columns / m.group * kTile, size = number_bytes(m.scale_type);
    const int64_t outer = m.scale_type == kProduct ? columns / kPanel * kTile * 2 : 0;
    const int64_t offset_size = m.form == kMinima ? size : m.form == kZeroPoints ? 1 : 0;
    Parts at;
    at.offsets = groups * size;
    at.outer_scales = at.offsets + groups * offset_size;
    at.outer_offsets = at.outer_scales + outer;
    at.codes = aligned(at.outer_offsets + (m.form == kMinima ? outer : 0));
    at.end = at.codes + columns * kTile * m.bits / 8;
    return at;
}

inline int64_t span_columns(const Matrix& m, int64_t start) {
    const int64_t left = padded(m.columns) - start;
    return left < kSpan ? left : kSpan;
}
inline int64_t tile_bytes(const Matrix& m) {
    const int64_t columns = padded(m.columns), last = columns % kSpan;
    return columns / kSpan * parts(m, kSpan).end + (last ? parts(m, last).end : 0);
}
inline int64_t packed_bytes(const Matrix& m) { return tiles(m) * tile_bytes(m); }

// Of a column within a span: its word, counted in lanes of 16 rows, and where its bits are there.
constexpr int64_t code_word(int32_t bits, int64_t column) { return column / (32 / bits); }
constexpr int code_shift(int32_t bits, int64_t column) {
    const int within = static_cast<int>(column);
    return bits == 4 ? 8 * (within % 4) + 4 * (within / 4 % 2) : 8 * (within % 4);
}

// ggml's kvalues_iq4nl.
constexpr int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                   1,    13,   25,  38,  53,  69,  89,  113};

}  // namespace zk
