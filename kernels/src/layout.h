// Where the numbers of a packed matrix lie.
//
// A *tile* is 16 rows, the vector lanes of every kernel; tiles follow each other, so a thread that
// takes a range of tiles reads one sequential stream.  A tile is a sequence of *panels* of 128
// columns, each holding the codes of its four blocks of 32 columns and then its scales:
//
//     codes   4 bits: [4 blocks][4][16 rows] words of eight codes, code + 8 each: columns 0..3 in
//                     the low nibbles of the four bytes, columns 4..7 in the high ones
//             8 bits: [4 blocks][8][16 rows] words of four codes, code + 128 each
//     scales  [128 / group][16 rows]
//
// Offsets make codes unsigned, which the dot product instructions of x86 want.  Rows and columns
// beyond the matrix have zero codes and zero scales.
#pragma once

#include <cstdint>

#include "zaya_kernels.h"

namespace zk {

constexpr int kTile = 16;
constexpr int kBlock = 32;
constexpr int kPanel = 128;
constexpr int kBlocks = kPanel / kBlock;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t scale_bytes(int32_t type) { return type == kFloat32 ? 4 : 2; }
constexpr int64_t block_bytes(int32_t bits) { return kTile * kBlock * bits / 8; }

inline int64_t panels(const Matrix& m) { return ceil_div(m.columns, kPanel); }
inline int64_t padded(int64_t columns) { return ceil_div(columns, kPanel) * kPanel; }
inline int64_t tiles(const Matrix& m) { return ceil_div(m.rows, kTile); }
inline int64_t panel_bytes(const Matrix& m) {
    return kBlocks * block_bytes(m.bits) + kPanel / m.group * kTile * scale_bytes(m.scale_type);
}
inline int64_t tile_bytes(const Matrix& m) { return panels(m) * panel_bytes(m); }
inline int64_t packed_bytes(const Matrix& m) { return tiles(m) * tile_bytes(m); }

// Of a column within a panel: its word, counted in lanes of 16 rows, and the bits in it.
inline int64_t code_word(int32_t bits, int64_t column) { return column / (32 / bits); }
inline int code_shift(int32_t bits, int64_t column) {
    const int within = static_cast<int>(column);
    return bits == 4 ? 8 * (within % 4) + 4 * (within / 4 % 2) : 8 * (within % 4);
}

// log2 of the blocks that share a scale.
inline int group_shift(const Matrix& m) { return m.group == 32 ? 0 : m.group == 64 ? 1 : 2; }

}  // namespace zk
