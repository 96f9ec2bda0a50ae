// The choice of an instruction set at run time.
#pragma once

#include <cstdint>

#include "layout.h"
#include "zaya_kernels.h"

namespace zk {

// How many int8 numbers, *limbs*, stand for an activation: each has 1 / 254 of the scale of the one
// before, so that what rounding leaves of that has codes -127 .. 127 too.  One when fast, else three,
// whose error is 2^-24 of the largest of 32.
constexpr int kLimbs = 3;
constexpr int32_t kLimb = 254;

// 32 activations of L limbs, which share a scale.  First numbers of a pair or triple are about all of
// them, second ones about the first 16, third ones about the last 16.  Small, so that a row stays in
// L1 while weights pass through it.
template <int L>
struct alignas(kLine) Block {
    int8_t codes[L][kBlock];
    float scale;  // of the last limb
    // -8 times the sum of the codes, of the first limb and of the further ones in units of the last:
    // takes the offset off weights of 4 bits.
    int32_t start[L > 1 ? 2 : 1][2];
    float total[3];  // the sum of the activations: what an offset of weights counts for
};
static_assert(sizeof(Block<1>) == kLine && sizeof(Block<kLimbs>) == 2 * kLine, "whole lines");

constexpr int64_t block_bytes(bool fast) { return fast ? sizeof(Block<1>) : sizeof(Block<kLimbs>); }

// Activations as kernels read them, zeros beyond the matrix.
struct Rows {
    char* data;       // [rows, columns / 32] of Block
    int64_t columns;  // padded

    template <int L>
    Block<L>* row(int64_t index) const {
        return reinterpret_cast<Block<L>*>(data) + index * (columns / kBlock);
    }
};

constexpr int kTogether = 4;  // tiles that a call of multiply takes at most

// What tile_kernel.cpp defines, once per instruction set.
//   prepare: one row of `columns` floats into row `index` of `rows`.
//   multiply: rows [first, first + count) by some tiles of a matrix: out [tiles, count, 16].
//   swiglu: gate[i] = silu(gate[i]) * up[i] for 16 * count numbers.
//   read: all numbers of some lines of memory, exclusive-ored.
#define ZK_KERNELS(name)                                                                       \
    namespace name {                                                                           \
    void prepare(const float* x, int64_t columns, bool fast, const Rows& rows, int64_t index); \
    void multiply(const Matrix& matrix, int64_t tile, int64_t tiles, bool fast,                \
                  const Rows& rows, int64_t first, int64_t count, float* out);                 \
    void swiglu(float* gate, const float* up, int64_t count);                                  \
    uint32_t read(const uint8_t* from, int64_t lines);                                         \
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
    decltype(&base::read) read;
};

#define ZK_CHOSEN(name) \
    Kernels { name::prepare, name::multiply, name::swiglu, name::read }

inline Kernels kernels_of(int32_t isa) {
#if defined(ZK_X86_KERNELS)
    if (isa == kAvx512) return ZK_CHOSEN(avx512);
    if (isa == kAvx2) return ZK_CHOSEN(avx2);
#elif defined(ZK_ARM_KERNELS)
    if (isa == kDotProduct) return ZK_CHOSEN(dotprod);
#endif
    (void)isa;
    return ZK_CHOSEN(base);
}
#undef ZK_CHOSEN

}  // namespace zk
