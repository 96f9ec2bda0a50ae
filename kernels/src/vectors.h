// Vectors of the instruction set that a file is compiled for; the file defines ZK_ISA_NAMESPACE.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ZK_INLINE inline __attribute__((always_inline))

namespace zk {
namespace ZK_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: x + magic rounds x to an integer

template <typename T>
ZK_INLINE T load(const void* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
ZK_INLINE V from_bits(U bits) { return (V)bits; }
ZK_INLINE V splat(float x) { return x - V{}; }
ZK_INLINE V to_float(I x) { return __builtin_convertvector(x, V); }
ZK_INLINE V widen_bfloat16(const void* from) {
    return from_bits(__builtin_convertvector(load<H>(from), U) << 16);
}

// The sum of all lanes, by halves.
ZK_INLINE float sum_of(V x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// e^x by 2^n e^r, |r| <= ln 2 / 2, and seven terms of the series; x is held within -87 .. 88.
ZK_INLINE V exponential(V x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const V shifted = x * 1.44269504f + kRoundMagic;  // its low bits are round(x / ln 2)
    const V n = shifted - kRoundMagic;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return from_bits((U)p + ((U)shifted << 23));
}

}  // namespace
}  // namespace ZK_ISA_NAMESPACE
}  // namespace zk
