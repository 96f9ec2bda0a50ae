// The choice of an instruction set at run time.
#pragma once

#include <cstdint>

#include "zaya_kernels.h"

namespace zk {

// 32 activations as int8 numbers times a scale.
struct Block {
    int8_t codes[32];
    float scale;
    // Of all of them, of the first 16 and of the last 16:
    int32_t start[3];  // -8 times the sum of the codes: takes the offset off weights of 4 bits
    float total[3];    // scale times the sum of the codes: what an offset of weights counts for
    int32_t reserved;
};
static_assert(sizeof(Block) == 64, "a line");

// Activations as kernels read them, zeros beyond the matrix.  The sum of `limbs` blocks, each with
// 1 / 254 of the scale of the one before, stands for 32 of them: one when fast, else three, whose
// error is 2^-24 of the largest of the 32.
struct Rows {
    Block* blocks;    // [rows, columns / 32, limbs]
    int64_t columns;  // padded
};
constexpr int kLimbs = 3;
constexpr float kLimb = 254.0f;  // twice 127, so that what rounding leaves has codes -127 .. 127
constexpr int limbs_of(bool fast) { return fast ? 1 : kLimbs; }

constexpr int kTogether = 4;  // tiles that a call of multiply takes at most

// What tile_kernel.cpp defines, once per instruction set.
//   prepare: one row of `columns` floats into row `index` of `rows`.
//   multiply: rows [first, first + count) by some tiles of a matrix: out [tiles, count, 16].
//   swiglu: gate[i] = silu(gate[i]) * up[i] for 16 * count numbers.
#define ZK_KERNELS(name)                                                                       \
    namespace name {                                                                           \
    void prepare(const float* x, int64_t columns, bool fast, const Rows& rows, int64_t index); \
    void multiply(const Matrix& matrix, int64_t tile, int64_t tiles, bool fast,                \
                  const Rows& rows, int64_t first, int64_t count, float* out);                 \
    void swiglu(float* gate, const float* up, int64_t count);                                  \
    }
ZK_KERNELS(base)  // on ARM, NEON
#if defined(ZK_X86_KERNELS)
ZK_KERNELS(avx2)
ZK_KERNELS(avx512)
#elif defined(ZK_ARM_KERNELS)
ZK_KERNELS(dotprod)
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
#elif defined(ZK_ARM_KERNELS)
    if (isa == kDotProduct) return {dotprod::prepare, dotprod::multiply, dotprod::swiglu};
#endif
    (void)isa;
    return {base::prepare, base::multiply, base::swiglu};
}

}  // namespace zk
