// The choice of an instruction set at run time.
#pragma once

#include <cstdint>

#include "zaya_kernels.h"

namespace zk {

// 32 activations in int8.
struct Block {
    int8_t codes[32];
    float scale;
    int32_t start;  // -8 times the sum of the codes: takes the offset off weights of 4 bits
};

// Activations as kernels read them, `padded` columns a row, zeros beyond the matrix.
struct Rows {
    float* values;    // [rows, columns], only when sums are fp32
    Block* blocks;    // [rows, columns / 32], only when fast
    int64_t columns;  // padded
};

// What tile_kernel.cpp defines, once per instruction set.
//   prepare: one row of `columns` floats into row `index` of `rows`.
//   multiply: rows [first, first + count) by one or two tiles of a matrix: out [tiles, count, 16].
//   swiglu: gate[i] = silu(gate[i]) * up[i] for 16 * count numbers.
#define ZK_KERNELS(name)                                                                     \
    namespace name {                                                                         \
    void prepare(const float* x, int64_t columns, bool fast, const Rows& rows, int64_t index); \
    void multiply(const Matrix& matrix, int64_t tile, int64_t tiles, bool fast,              \
                  const Rows& rows, int64_t first, int64_t count, float* out);               \
    void swiglu(float* gate, const float* up, int64_t count);                                \
    }
ZK_KERNELS(base)
#if defined(ZK_X86_KERNELS)
ZK_KERNELS(avx2)
ZK_KERNELS(avx512)
#endif
#undef ZK_KERNELS

struct Kernels {
    decltype(&base::prepare) prepare;
    decltype(&base::multiply) multiply;
    decltype(&base::swiglu) swiglu;
};

inline Kernels kernels_of(int32_t isa) {
#if defined(ZK_X86_KERNELS)
    if (isa == kAvx512) return {avx512::prepare, avx512::multiply, avx512::swiglu};
    if (isa == kAvx2) return {avx2::prepare, avx2::multiply, avx2::swiglu};
#endif
    (void)isa;
    return {base::prepare, base::multiply, base::swiglu};
}

}  // namespace zk
