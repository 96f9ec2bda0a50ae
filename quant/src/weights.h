// What the kernels share: weights as they lie in memory, numbers as files hold them, sums.
//
// Like simd.h this is compiled once per instruction set, with internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"
#include "zaya_quant.h"

namespace zq {
namespace ZQ_ISA_NAMESPACE {
namespace {

// ---- weights ------------------------------------------------------------------------------------

ZQ_INLINE V widen(U raw, int32_t dtype) {
    if (dtype == kBFloat16) return from_bits(raw << 16);
    // fp16: 2^112 moves the exponent bias from 15 to 127, exactly, subnormals included.
    const V value = from_bits((raw & 0x7FFFu) << 13) * 0x1p112f;
    const I special = (raw & 0x7C00u) == 0x7C00u;
    const U bits = to_bits(value) | ((raw & 0x8000u) << 16);
    return from_bits(bits | ((U)special & 0x7F800000u));
}

// Elements start .. start + W - 1 of a group with `length` of them; zeros beyond.
template <int DTYPE>
ZQ_INLINE V load(const void* group, int64_t start, int64_t length) {
    const int64_t left = length - start;
    if (DTYPE == kFloat32) {
        V x{};
        const float* source = static_cast<const float*>(group) + start;
        if (left >= W) std::memcpy(&x, source, sizeof x);
        else if (left > 0) std::memcpy(&x, source, 4 * left);
        return x;
    }
    H x{};
    const uint16_t* source = static_cast<const uint16_t*>(group) + start;
    if (left >= W) std::memcpy(&x, source, sizeof x);
    else if (left > 0) std::memcpy(&x, source, 2 * left);
    return widen(zero_extend(x), DTYPE);
}

inline int64_t first_non_finite(const void* weight, int32_t dtype, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        bool bad;
        if (dtype == kFloat32) {
            uint32_t bits;
            std::memcpy(&bits, static_cast<const char*>(weight) + 4 * i, 4);
            bad = (bits & 0x7F800000u) == 0x7F800000u;
        } else {
            const uint16_t mask = dtype == kBFloat16 ? 0x7F80 : 0x7C00;
            bad = (static_cast<const uint16_t*>(weight)[i] & mask) == mask;
        }
        if (bad) return i;
    }
    return -1;
}

// ---- scales -------------------------------------------------------------------------------------

// Round to nearest even in the type of the scales; what overflows compares as unusable.
ZQ_INLINE V round_scale(V scale, int32_t dtype) {
    if (dtype == kFloat32) return scale;
    const U bits = to_bits(scale);
    if (dtype == kBFloat16) return from_bits((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
    const V normal = from_bits((bits + 0xFFFu + ((bits >> 13) & 1u)) & 0xFFFFE000u);
    // Below 2^-14 fp16 counts in steps of 2^-24, the spacing of float32 in [0.5, 1).
    const V size = magnitude(scale);
    const V subnormal = from_bits(to_bits((size + 0.5f) - 0.5f) | (bits & 0x80000000u));
    return select(size < splat(0x1p-14f), subnormal, normal);
}

ZQ_INLINE float largest_scale(int32_t dtype) {
    if (dtype == kFloat16) return 65504.0f;
    return dtype == kBFloat16 ? 0x1.FEp127f : 0x1.FFFFFEp127f;
}

// The bits of a number that fp16 holds exactly.
inline uint16_t half_bits(float exact) {
    uint32_t bits;
    std::memcpy(&bits, &exact, 4);
    const float size = exact < 0 ? -exact : exact;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t half = size < 0x1p-14f ? static_cast<uint32_t>(size * 0x1p24f)
                                          : ((bits & 0x7FFFFFFFu) - 0x38000000u) >> 13;
    return static_cast<uint16_t>(sign | half);
}

// ---- normalisation ------------------------------------------------------------------------------

// 2^-e and 2^e, e = floor(log2 absmax) limited to -126..126 so that both are normal.
ZQ_INLINE void powers_of(V absmax, V& inverse_power, V& power) {
    I exponent = (I)(to_bits(absmax) >> 23) - 127;
    exponent = exponent < -126 ? I{} - 126 : exponent;
    exponent = exponent > 126 ? I{} + 126 : exponent;
    inverse_power = from_bits((U)((127 - exponent) << 23));
    power = from_bits((U)((127 + exponent) << 23));
}

// ---- sums ---------------------------------------------------------------------------------------

// Element i belongs to lane i mod LANES; a lane adds in order; then the upper half of the lanes is
// added to the lower until one is left.
template <int LANES>
struct Sum {
    V lane[LANES];

    ZQ_INLINE void add(bool first, int i, V x) { lane[i] = first ? x : lane[i] + x; }

    template <int HALF = LANES / 2>
    ZQ_INLINE V fold() {
#pragma GCC unroll 16
        for (int i = 0; i < HALF; i++) lane[i] = lane[i] + lane[i + HALF];
        if constexpr (HALF > 1) return fold<HALF / 2>();
        else return lane[0];
    }
};

// Calls body(first, lane, element) for every element.  Unrolled so that lanes stay in registers.
template <int LANES, typename Body>
ZQ_INLINE void each(int64_t count, Body body) {
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) body(true, lane, lane);
    for (int64_t start = LANES; start < count; start += LANES) {
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) body(false, lane, start + lane);
    }
}

}  // namespace
}  // namespace ZQ_ISA_NAMESPACE
}  // namespace zq
