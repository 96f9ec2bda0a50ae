// Products with tiles of a packed matrix.  Compiled once per instruction set.
//
// A vector lane is one of the tile's 16 rows: kParts vectors hold a number of each.  Weights are
// loaded once for up to kMost rows of activations, whose numbers are broadcast.  The operations on
// a row of activations and their order do not depend on how many rows stand beside it.
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "layout.h"

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
constexpr int kParts = kTile / W;
constexpr int kMost = W == 16 ? 8 : W == 8 ? 2 : 1;  // what registers hold without spilling

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int8_t B __attribute__((vector_size(W)));

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: x + magic rounds x to an integer

#define ZK_INLINE inline __attribute__((always_inline))

template <typename T>
ZK_INLINE T load(const void* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
ZK_INLINE V from_bits(U bits) { return (V)bits; }
ZK_INLINE V splat(float x) { return x - V{}; }
ZK_INLINE V to_float(I x) { return __builtin_convertvector(x, V); }

// ---- what compilers find no good code for --------------------------------------------------------

// acc + the dot product of the four unsigned bytes of each lane of w with the four signed bytes of
// x.  w holds codes of BITS bits plus their offset.
#if defined(__AVX512F__)
template <int BITS>
ZK_INLINE I dot(I acc, U w, int32_t x) {
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
}
ZK_INLINE V widen_half(const void* from) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#elif defined(__AVX2__)
// Pairs are summed in 16 bits.  They cannot overflow with 4 bits (2 * 15 * 127); with 8 the
// offset is taken off again and the sign of a weight moved to x (2 * 128 * 127).
template <int BITS>
ZK_INLINE I dot(I acc, U w, int32_t x) {
    __m256i weights = (__m256i)w, inputs = _mm256_set1_epi32(x);
    if (BITS == 8) {
        const __m256i codes = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
        weights = _mm256_abs_epi8(codes);
        inputs = _mm256_sign_epi8(inputs, codes);
    }
    const __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
    return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
ZK_INLINE V widen_half(const void* from) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
#else
template <int BITS>
ZK_INLINE I dot(I acc, U w, int32_t x) {
    const uint32_t bytes = static_cast<uint32_t>(x);
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) {
        const I weights = (I)((w >> (8 * byte)) & 0xFFu);
        acc += weights * static_cast<int8_t>(bytes >> (8 * byte));
    }
    return acc;
}
ZK_INLINE V widen_half(const void* from) {
    // 2^112 moves the exponent bias from 15 to 127, exactly, subnormals included.
    const U raw = __builtin_convertvector(load<H>(from), U);
    const V value = from_bits((raw & 0x7FFFu) << 13) * 0x1p112f;
    return from_bits((U)value | ((raw & 0x8000u) << 16));
}
#endif

template <int SCALE>
ZK_INLINE V load_scales(const uint8_t* from, int part) {
    if (SCALE == kFloat32) return load<V>(from + 4 * W * part);
    if (SCALE == kFloat16) return widen_half(from + 2 * W * part);
    return from_bits(__builtin_convertvector(load<H>(from + 2 * W * part), U) << 16);
}

// What takes the offset of the weights off: 128 times the sum with 8 bits, except where AVX2 has
// done so already.
template <int BITS>
ZK_INLINE I start_of(const Block& x) {
    const I start = I{} + x.start;
    return BITS == 4 ? start : W == 8 ? I{} : start << 4;
}

// ---- one block of 32 columns ---------------------------------------------------------------------

ZK_INLINE int32_t word(const int8_t* codes) { return load<int32_t>(codes); }

// Adds to acc[r] the dot products of a block's codes with block `block` of each row.
template <int BITS, int R, int T>
ZK_INLINE void fast_block(const uint8_t* codes, int64_t tile_step, const Block* const* x,
                          int64_t block, I (*acc)[R][kParts]) {
    constexpr int kWords = BITS;  // of 32 bits in a row of 32 codes
#pragma GCC unroll 8
    for (int i = 0; i < kWords; i++) {
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                const U w = load<U>(codes + t * tile_step + 4 * (kTile * i + W * part));
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    I& sum = acc[t][r][part];
                    const int8_t* own = x[r][block].codes;
                    if (BITS == 4) {
                        sum = dot<4>(sum, w & 0x0F0F0F0Fu, word(own + 8 * i));
                        sum = dot<4>(sum, (w >> 4) & 0x0F0F0F0Fu, word(own + 8 * i + 4));
                    } else {
                        sum = dot<8>(sum, w, word(own + 4 * i));
                    }
                }
            }
        }
    }
}

// The code in the given bits of each lane, as a float.
template <int BITS>
ZK_INLINE V decode(U w, int shift) {
#if defined(__AVX512F__)
    if (BITS == 4) {  // a look-up that ignores the bits above
        const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return (V)_mm512_permutexvar_ps((__m512i)(w >> shift), levels);
    }
#endif
    constexpr uint32_t mask = (1u << BITS) - 1;
    return to_float((I)((w >> shift) & mask) - (1 << (BITS - 1)));
}

template <int BITS, int R>
ZK_INLINE void exact_block(const uint8_t* codes, const float* const* x, V (*acc)[kParts]) {
    constexpr int kWords = BITS, kCodes = 32 / BITS;
#pragma GCC unroll 8
    for (int i = 0; i < kWords; i++) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; part++) {
            const U w = load<U>(codes + 4 * (kTile * i + W * part));
#pragma GCC unroll 8
            for (int j = 0; j < kCodes; j++) {
                const V value = decode<BITS>(w, code_shift(BITS, j));
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) acc[r][part] += value * x[r][kCodes * i + j];
            }
        }
    }
}

// ---- one tile, or two ----------------------------------------------------------------------------

// Where results go: `rows` of the first tile, then those of the next one.
struct Out {
    float* values;
    int64_t rows;
};

template <int R, int T>
ZK_INLINE void store(const V (*sum)[R][kParts], const Out& out, int64_t row) {
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
        std::memcpy(out.values + (t * out.rows + row) * kTile, sum[t], sizeof sum[t]);
}

template <int BITS, int SCALE, int R, int T>
void fast_tile(const Matrix& m, const uint8_t* panel, const Rows& rows, int64_t first, Out out,
               int64_t row) {
    const int64_t step = panel_bytes(m), tile_step = tile_bytes(m);
    const int64_t row_blocks = rows.columns / kBlock;
    const int shift = group_shift(m);
    const Block* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = rows.blocks + (first + row + r) * row_blocks;
    V sum[T][R][kParts] = {};
    for (int64_t start = 0; start < row_blocks; start += kBlocks, panel += step) {
        for (int b = 0; b < kBlocks; b++) {
            const int64_t block = start + b;
            I acc[T][R][kParts];
#pragma GCC unroll 2
            for (int t = 0; t < T; t++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                    for (int part = 0; part < kParts; part++)
                        acc[t][r][part] = start_of<BITS>(x[r][block]);
            fast_block<BITS, R, T>(panel + b * block_bytes(BITS), tile_step, x, block, acc);
            const uint8_t* scales = panel + kBlocks * block_bytes(BITS) +
                                    (b >> shift) * kTile * scale_bytes(SCALE);
#pragma GCC unroll 2
            for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
                for (int part = 0; part < kParts; part++) {
                    const V scale = load_scales<SCALE>(scales + t * tile_step, part);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++)
                        sum[t][r][part] += to_float(acc[t][r][part]) * (scale * x[r][block].scale);
                }
            }
        }
    }
    store<R, T>(sum, out, row);
}

template <int BITS, int SCALE, int R>
void exact_tile(const Matrix& m, const uint8_t* panel, const Rows& rows, int64_t first, Out out,
                int64_t row) {
    const int64_t step = panel_bytes(m);
    const int shift = group_shift(m);
    V sum[1][R][kParts] = {};
    for (int64_t start = 0; start < rows.columns; start += kPanel, panel += step) {
        for (int b = 0; b < kBlocks; b++) {
            const float* x[R];
            V acc[R][kParts] = {};
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                x[r] = rows.values + (first + row + r) * rows.columns + start + b * kBlock;
            exact_block<BITS, R>(panel + b * block_bytes(BITS), x, acc);
            const uint8_t* scales = panel + kBlocks * block_bytes(BITS) +
                                    (b >> shift) * kTile * scale_bytes(SCALE);
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                const V scale = load_scales<SCALE>(scales, part);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sum[0][r][part] += acc[r][part] * scale;
            }
        }
    }
    store<R, 1>(sum, out, row);
}

// ---- all rows ------------------------------------------------------------------------------------

// Takes R rows as often as they are there, the rest in smaller handfuls.
template <int BITS, int SCALE, int R, int T>
void all_rows(const Matrix& m, const uint8_t* tile, bool fast, const Rows& rows, int64_t first,
              int64_t count, Out out, int64_t row) {
    for (; count - row >= R; row += R) {
        if (fast || T > 1) fast_tile<BITS, SCALE, R, T>(m, tile, rows, first, out, row);
        else exact_tile<BITS, SCALE, R>(m, tile, rows, first, out, row);
    }
    if constexpr (R > 1) {
        if (row < count)
            all_rows<BITS, SCALE, R / 2, T>(m, tile, fast, rows, first, count, out, row);
    }
}

// Two tiles at once share the broadcasts of activations.  Where decoding takes longer than those
// (fp32 sums), or weights are read for a single row (two streams are slower than one), it is one
// tile after the other.
template <int BITS, int SCALE>
void by_count(const Matrix& m, const uint8_t* tile, int64_t tiles, bool fast, const Rows& rows,
              int64_t first, int64_t count, Out out) {
    if constexpr (kMost > 2) {
        if (fast && tiles == 2 && count > 1)
            return all_rows<BITS, SCALE, kMost / 2, 2>(m, tile, fast, rows, first, count, out, 0);
    }
    for (int64_t t = 0; t < tiles; t++, tile += tile_bytes(m), out.values += count * kTile)
        all_rows<BITS, SCALE, kMost, 1>(m, tile, fast, rows, first, count, out, 0);
}

template <int BITS>
void by_scale(const Matrix& m, const uint8_t* tile, int64_t tiles, bool fast, const Rows& rows,
              int64_t first, int64_t count, Out out) {
    switch (m.scale_type) {
        case kFloat16: return by_count<BITS, kFloat16>(m, tile, tiles, fast, rows, first, count, out);
        case kBFloat16: return by_count<BITS, kBFloat16>(m, tile, tiles, fast, rows, first, count, out);
        default: return by_count<BITS, kFloat32>(m, tile, tiles, fast, rows, first, count, out);
    }
}

// ---- activations ---------------------------------------------------------------------------------

// 32 numbers to codes -127 .. 127; what is not finite makes the scale, and so the result, NaN.
ZK_INLINE void quantize_block(const float* x, Block& out) {
    constexpr int kVectors = kBlock / W;
    V value[kVectors], most{};
    I finite = I{} - 1;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
        value[i] = load<V>(x + W * i);
        const V size = from_bits((U)value[i] & 0x7FFFFFFFu);
        finite &= size <= splat(3.402823466e38f);
        most = size > most ? size : most;
    }
    float largest = 0;
    bool all_finite = true;
    for (int lane = 0; lane < W; lane++) {
        largest = most[lane] > largest ? most[lane] : largest;
        all_finite &= finite[lane] != 0;
    }
    // Below this 127 / largest overflows; such activations count as zero.
    const float inverse = all_finite && largest > 0x1p-120f ? 127.0f / largest : 0.0f;
    I total{};
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
        const V bounded = all_finite ? value[i] : V{};
        const V rounded = (bounded * inverse + kRoundMagic) - kRoundMagic;
        const I code = __builtin_convertvector(rounded, I);
        const B narrow = __builtin_convertvector(code, B);
        std::memcpy(out.codes + W * i, &narrow, sizeof narrow);
        total += code;
    }
    int32_t all = 0;
    for (int lane = 0; lane < W; lane++) all += total[lane];
    out.scale = all_finite ? largest / 127.0f : __builtin_nanf("");
    out.start = -8 * all;
}

// e^x by 2^n e^r, |r| <= ln 2 / 2, and seven terms of the series.
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

void prepare(const float* x, int64_t columns, bool fast, const Rows& rows, int64_t index) {
    if (!fast) {
        float* row = rows.values + index * rows.columns;
        std::memcpy(row, x, 4 * columns);
        std::memset(row + columns, 0, 4 * (rows.columns - columns));
        return;
    }
    const int64_t blocks = rows.columns / kBlock;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * kBlock;
        float last[kBlock] = {};
        const bool whole = start + kBlock <= columns;
        if (!whole && start < columns) std::memcpy(last, x + start, 4 * (columns - start));
        quantize_block(whole ? x + start : last, rows.blocks[index * blocks + block]);
    }
}

void multiply(const Matrix& matrix, int64_t tile, int64_t tiles, bool fast, const Rows& rows,
              int64_t first, int64_t count, float* out) {
    const uint8_t* data = matrix.data + tile * tile_bytes(matrix);
    const Out target{out, count};
    if (matrix.bits == 4) by_scale<4>(matrix, data, tiles, fast, rows, first, count, target);
    else by_scale<8>(matrix, data, tiles, fast, rows, first, count, target);
}

void swiglu(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < kTile * count; i += W) {
        const V g = load<V>(gate + i);
        const V result = g / (1.0f + exponential(-g)) * load<V>(up + i);
        std::memcpy(gate + i, &result, sizeof result);
    }
}

}  // namespace ZK_ISA_NAMESPACE
}  // namespace zk
