// W floats at a time, W being what the instruction set of this compilation holds in one register.
//
// GCC and clang vectors do the arithmetic; only what they compile badly is spelled out per
// instruction set.  Everything here has internal linkage: the same header is compiled several
// times with different flags, and no copy may stand in for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace zq {
namespace ZQ_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: x + magic rounds x to an integer

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int8_t B __attribute__((vector_size(W)));

#define ZQ_INLINE inline __attribute__((always_inline))
#define ZQ_LAMBDA __attribute__((always_inline))

ZQ_INLINE V splat(float x) { return x - V{}; }  // keeps -0
ZQ_INLINE V select(I mask, V yes, V no) { return mask ? yes : no; }
ZQ_INLINE V from_bits(U bits) { V x; std::memcpy(&x, &bits, sizeof x); return x; }
ZQ_INLINE U to_bits(V x) { U bits; std::memcpy(&bits, &x, sizeof x); return bits; }
ZQ_INLINE V magnitude(V x) { return from_bits(to_bits(x) & 0x7FFFFFFFu); }

// The few operations for which compilers find no good code by themselves.  `low_bytes` keeps the low
// byte of every element.
#if defined(__AVX512F__)
ZQ_INLINE V vmin(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
ZQ_INLINE V vmax(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
ZQ_INLINE V vround(V x) { return (V)_mm512_roundscale_ps((__m512)x, 0x08); }
ZQ_INLINE U zero_extend(H x) { return (U)_mm512_cvtepu16_epi32((__m256i)x); }
ZQ_INLINE B low_bytes(U x) { return (B)_mm512_cvtepi32_epi8((__m512i)x); }
ZQ_INLINE bool any(I mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
// table[index & 31]
ZQ_INLINE V pick32(const float* table, U index) {
    const __m512 low = _mm512_load_ps(table), high = _mm512_load_ps(table + 16);
    return (V)_mm512_permutex2var_ps(low, (__m512i)index, high);
}
#elif defined(__AVX2__)
ZQ_INLINE V vmin(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
ZQ_INLINE V vmax(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
ZQ_INLINE V vround(V x) { return (V)_mm256_round_ps((__m256)x, 0x08); }
ZQ_INLINE U zero_extend(H x) { return (U)_mm256_cvtepu16_epi32((__m128i)x); }
ZQ_INLINE B low_bytes(U x) {
    const __m128i low = _mm256_castsi256_si128((__m256i)(x & 0xFFu));
    const __m128i high = _mm256_extracti128_si256((__m256i)(x & 0xFFu), 1);
    const __m128i words = _mm_packus_epi32(low, high);
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    return (B)bytes;
}
ZQ_INLINE bool any(I mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
// table[index & 7]
ZQ_INLINE V pick8(const float* table, U index) {
    return (V)_mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
}
#else
ZQ_INLINE V vmin(V a, V b) { return a < b ? a : b; }
ZQ_INLINE V vmax(V a, V b) { return a > b ? a : b; }
// Exact for |x| < 2^22; codes are clamped before they are rounded.
ZQ_INLINE V vround(V x) { return (x + kRoundMagic) - kRoundMagic; }
ZQ_INLINE U zero_extend(H x) { return __builtin_convertvector(x, U); }
ZQ_INLINE B low_bytes(U x) { return __builtin_convertvector(x, B); }
ZQ_INLINE bool any(I mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
#endif

// W x W transposition: log2 W perfect shuffles of the rows.
ZQ_INLINE void transpose(V* rows) {
#if defined(__AVX512F__)
#define ZQ_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZQ_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define ZQ_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZQ_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ZQ_LOW 0, 4, 1, 5
#define ZQ_HIGH 2, 6, 3, 7
#endif
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        V next[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = __builtin_shufflevector(rows[i], rows[i + W / 2], ZQ_LOW);
            next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + W / 2], ZQ_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) rows[i] = next[i];
    }
#undef ZQ_LOW
#undef ZQ_HIGH
}

}  // namespace
}  // namespace ZQ_ISA_NAMESPACE
}  // namespace zq
