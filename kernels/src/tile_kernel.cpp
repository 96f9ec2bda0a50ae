// Products with tiles of a packed matrix.  Compiled once per instruction set.
//
// A vector lane is one of the tile's 16 rows: kParts vectors hold a number of each.  Weights are
// loaded once for up to four tiles and four rows of activations, whose numbers are broadcast.  The
// operations on a row of activations and their order do not depend on how many rows stand beside it.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "layout.h"
#include "vectors.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace zk {
namespace ZK_ISA_NAMESPACE {
namespace {

typedef int8_t B __attribute__((vector_size(W)));
typedef uint8_t Z __attribute__((vector_size(W)));

constexpr int kParts = kTile / W;

// What registers hold without spilling: rows of one limb, tiles once there are so many rows, and
// sums of limbs of one tile.
#if defined(__AVX512F__)
constexpr int kFastRows = 4, kTiles = 4, kSums = 12;
#elif defined(__AVX2__)
constexpr int kFastRows = 2, kTiles = 1, kSums = 6;
#elif defined(__ARM_NEON)
constexpr int kFastRows = 4, kTiles = 1, kSums = 12;
#else
constexpr int kFastRows = 1, kTiles = 1, kSums = 0;
#endif

// How numbers are stored, as far as it changes a loop.
//   BITS: 4 or 8.  LEVELS: codes of 4 bits name levels.  OFFSETS: there are some.
//   HALVES: groups that a block of 32 columns spans, 1 or 2.
template <int BITS_, bool LEVELS_, bool OFFSETS_, int HALVES_>
struct Grid {
    static constexpr int BITS = BITS_, HALVES = HALVES_;
    static constexpr bool LEVELS = LEVELS_, OFFSETS = OFFSETS_;
    static constexpr int kWords = BITS;                 // of 32 bits in a row of 32 codes
    static constexpr int kQuads = 8 / kWords;           // fours of columns in a word
    static constexpr bool kWide = BITS == 8 || LEVELS;  // bytes are codes + 128, not + 8
};

// Bytes of 4-bit codes that are fetched ahead where one load of weights serves several limbs: so much
// is computed meanwhile that the processor does not look ahead far enough by itself.
constexpr int64_t kAhead = 1024;

// ---- what compilers find no good code for --------------------------------------------------------

// acc + the dot product of the four unsigned bytes of each lane of w with the four signed bytes of
// x.  WIDE: bytes may exceed 127.
#if defined(__AVX512F__)
constexpr bool kSigned = false;
template <bool WIDE>
ZK_INLINE I dot(I acc, U w, int32_t x) {
    return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
}
// One instruction, which gcc does not see: the fewer there are, the further the processor looks
// ahead, and the earlier it asks for weights.
template <bool WIDE>
ZK_INLINE I dot_once(I acc, U w, const int8_t* x) {
    asm("vpdpbusd %1%{1to16%}, %2, %0"
        : "+v"(acc) : "m"(*reinterpret_cast<const int8_t(*)[4]>(x)), "v"(w));
    return acc;
}
ZK_INLINE V widen_half(const void* from) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
ZK_INLINE I widen_unsigned(const uint8_t* from) {
    return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
ZK_INLINE I widen_signed(const uint8_t* from) {
    return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
ZK_INLINE U look_up(U nibbles) {
    const __m128i table = _mm_xor_si128(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIq4Levels)), _mm_set1_epi8(-128));
    return (U)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)nibbles);
}
#elif defined(__AVX2__)
// Pairs are summed in 16 bits.  They cannot overflow with 4 bits (2 * 15 * 127); with 8 the
// offset is taken off again and the sign of a weight moved to x (2 * 128 * 127).
constexpr bool kSigned = true;
template <bool WIDE>
ZK_INLINE I dot(I acc, U w, int32_t x) {
    __m256i weights = (__m256i)w, inputs = _mm256_set1_epi32(x);
    if (WIDE) {
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
ZK_INLINE I widen_unsigned(const uint8_t* from) {
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
ZK_INLINE I widen_signed(const uint8_t* from) {
    return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
ZK_INLINE void store_narrow(I x, int8_t* to) {
    const __m128i pairs =
        _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(pairs, pairs));
}
ZK_INLINE U look_up(U nibbles) {
    const __m128i table = _mm_xor_si128(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIq4Levels)), _mm_set1_epi8(-128));
    return (U)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)nibbles);
}
#elif defined(__ARM_NEON)
constexpr bool kSigned = true;
template <bool WIDE>
ZK_INLINE I dot(I acc, U w, int32_t x) {
    const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(x));
    int8x16_t codes = (int8x16_t)w;
    if (WIDE) codes = veorq_s8(codes, vdupq_n_s8(-128));
#if defined(__ARM_FEATURE_DOTPROD)
    return (I)vdotq_s32((int32x4_t)acc, codes, inputs);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(inputs));
    const int16x8_t high = vmull_s8(vget_high_s8(codes), vget_high_s8(inputs));
    return acc + (I)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
ZK_INLINE V widen_half(const void* from) {
    return (V)vcvt_f32_f16(vld1_f16(static_cast<const float16_t*>(from)));
}
ZK_INLINE U look_up(U nibbles) {
    const uint8x16_t table = veorq_u8(vreinterpretq_u8_s8(vld1q_s8(kIq4Levels)), vdupq_n_u8(128));
    return (U)vqtbl1q_u8(table, (uint8x16_t)nibbles);
}
#else
constexpr bool kSigned = false;
template <bool WIDE>
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
ZK_INLINE U look_up(U nibbles) {
    U levels{};
    for (int lane = 0; lane < W; lane++)
        for (int shift = 0; shift < 32; shift += 8) {
            const int level = kIq4Levels[nibbles[lane] >> shift & 15u] + 128;
            levels[lane] |= static_cast<uint32_t>(level) << shift;
        }
    return levels;
}
#endif

#if !defined(__AVX512F__)
template <bool WIDE>
ZK_INLINE I dot_once(I acc, U w, const int8_t* x) { return dot<WIDE>(acc, w, load<int32_t>(x)); }
#endif
#if defined(__AVX512F__) || !defined(__AVX2__)
ZK_INLINE void store_narrow(I x, int8_t* to) {
    const B narrow = __builtin_convertvector(x, B);
    std::memcpy(to, &narrow, sizeof narrow);
}
#endif
#if !defined(__AVX2__)
ZK_INLINE I widen_unsigned(const uint8_t* from) {
    return __builtin_convertvector(load<Z>(from), I);
}
ZK_INLINE I widen_signed(const uint8_t* from) {
    return __builtin_convertvector(load<B>(from), I);
}
#endif

// ---- scales --------------------------------------------------------------------------------------

// The scales of a span as floats, and what is added to code times scale.
template <int TILES>
struct Scales {
    alignas(kLine) float scale[TILES][kSpan / 16 * kTile + 16];
    alignas(kLine) float offset[TILES][kSpan / 16 * kTile + 16];
};

template <int32_t TYPE>
ZK_INLINE V number(const uint8_t* from, const uint8_t* outer, int64_t index, int part) {
    const int64_t at = index * kTile + W * part;
    if (TYPE == kFloat32) return load<V>(from + 4 * at);
    if (TYPE == kFloat16) return widen_half(from + 2 * at);
    if (TYPE == kBFloat16) return widen_bfloat16(from + 2 * at);
    return widen_half(outer + 2 * W * part) *
           to_float(widen_signed(from + at));
}

// body(index, part, where) for all numbers of a kind.
template <typename Body>
ZK_INLINE void each_number(int64_t groups, float* out, Body body) {
    for (int64_t index = 0; index < groups; index++)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; part++) {
            float* target = out + index * kTile + W * part;
            const V value = body(index, part, target);
            std::memcpy(target, &value, sizeof value);
        }
}

template <int32_t TYPE>
void decode_scales(const Matrix& m, const uint8_t* span, int64_t columns, float* scales,
                   float* offsets) {
    const Parts at = parts(m, columns);
    const int64_t groups = columns / m.group, own = kPanel / m.group;
    const auto stored = [&](int64_t from, int64_t outer, int64_t index, int part) {
        const int64_t panel = TYPE == kProduct ? index / own * kTile * 2 : 0;
        return number<TYPE>(span + from, span + outer + panel, index, part);
    };
    each_number(groups, scales, [&](int64_t index, int part, float*) {
        return stored(0, at.outer_scales, index, part);
    });
    // Kernels take codes as u - center.
    const float center = m.bits == 4 ? 8.0f : 128.0f;
    if (m.form == kZeroPoints) {
        each_number(groups, offsets, [&](int64_t index, int part, const float* target) {
            const I zeros = widen_unsigned(span + at.offsets + index * kTile + W * part);
            return (center - to_float(zeros)) * load<V>(scales + (target - offsets));
        });
    } else if (m.form == kMinima) {
        const float count = m.bits == 4 ? center : 0.0f;
        each_number(groups, offsets, [&](int64_t index, int part, const float* target) {
            return stored(at.offsets, at.outer_offsets, index, part) +
                   count * load<V>(scales + (target - offsets));
        });
    } else if (m.group == 16) {  // whose kernels add offsets always
        std::memset(offsets, 0, 4 * groups * kTile);
    }
}

void decode_scales(const Matrix& m, const uint8_t* span, int64_t columns, float* scales,
                   float* offsets) {
    switch (m.scale_type) {
        case kFloat16: return decode_scales<kFloat16>(m, span, columns, scales, offsets);
        case kBFloat16: return decode_scales<kBFloat16>(m, span, columns, scales, offsets);
        case kProduct: return decode_scales<kProduct>(m, span, columns, scales, offsets);
        default: return decode_scales<kFloat32>(m, span, columns, scales, offsets);
    }
}

// ---- a span of some tiles ------------------------------------------------------------------------

// What a call is about: rows of activations, and where in them the span begins.
struct Task {
    const Matrix& matrix;
    const Rows& rows;
    int64_t first;    // row
    int64_t count;    // of rows
    int64_t start;    // column
    int64_t columns;  // of the span
    const uint8_t* codes;  // of the first tile
    int64_t tile_step;     // bytes from tile to tile
    float* out;            // [tiles, count, 16], added to
    const uint8_t* ahead;  // codes of the first tile that come next, or null
};

// The index of the group of half `half` of block `block`.
template <typename G>
ZK_INLINE int64_t group_of(int64_t block, int half, int shift) {
    return G::HALVES == 2 ? 2 * block + half : block >> shift;
}

// Adds to acc the dot products of a block's codes with those of each limb of R blocks of activations.
template <typename G, int R, int T, int L>
ZK_INLINE void dots(const uint8_t* codes, int64_t tile_step, const Block<L>* const* x,
                    I (*acc)[R * L][G::HALVES][kParts]) {
#pragma GCC unroll 8
    for (int i = 0; i < G::kWords; i++) {
        const int half = G::HALVES == 2 ? 2 * i / G::kWords : 0;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; part++) {
            U w[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; t++)
                w[t] = load<U>(codes + t * tile_step + 4 * (kTile * i + W * part));
#pragma GCC unroll 2
            for (int quad = 0; quad < G::kQuads; quad++) {
                U bytes[T];
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    bytes[t] = G::BITS == 8 ? w[t] : (w[t] >> (4 * quad)) & 0x0F0F0F0Fu;
                    if (G::LEVELS) bytes[t] = look_up(bytes[t]);
                }
#pragma GCC unroll 16
                for (int r = 0; r < R * L; r++) {
                    const int8_t* own = x[r / L]->codes[r % L] + 4 * (G::kQuads * i + quad);
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++) {
                        I& sum = acc[t][r][half][part];
                        sum = T == 1 ? dot_once<G::kWide>(sum, bytes[t], own)
                                     : dot<G::kWide>(sum, bytes[t], load<int32_t>(own));
                    }
                }
            }
        }
    }
}

// What takes the center of the codes off, unless `dot` has done so.
template <typename G, int L>
ZK_INLINE I start_of(const Block<L>& x, int limb, int half) {
    if ((G::kWide && kSigned) || (limb > 0 && limb < L - 1)) return I{};
    const int32_t* own = x.start[limb > 0];
    const I start = I{} + (G::HALVES == 1 ? own[0] : half == 0 ? own[1] : own[0] - own[1]);
    return G::kWide ? start << 4 : start;
}

// The sum of the limbs' sums, in units of the last: as integers where that stays below 31 bits, as
// it does for all three limbs of 4-bit codes (8 * 127 * 32 * 254^2) and for the last two of wide ones.
template <typename G, int L, typename Sum>
ZK_INLINE V joined(Sum sum) {
    constexpr int kFirst = G::kWide && L > 1 ? 1 : 0;
    I all = sum(kFirst);
#pragma GCC unroll 4
    for (int limb = kFirst + 1; limb < L; limb++) {
        const U before = (U)all;
        all = (I)((before << 8) - (before << 1)) + sum(limb);
    }
    static_assert(kLimb == 256 - 2, "what is shifted");
    return kFirst ? to_float(all) + to_float(sum(0)) * float{kLimb * kLimb} : to_float(all);
}

// R rows of activations of L limbs by T tiles.
template <typename G, int R, int T, int L>
void one_span(const Task& task, const Scales<T>& scales, int64_t row) {
    constexpr bool kHeld = T * R * kParts <= 8;  // sums in registers, else in L1
    const Block<L>* x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
        x[r] = task.rows.row<L>(task.first + row + r) + task.start / kBlock;
    const auto sum_at = [&](int t, int r, int part) {
        return task.out + (t * task.count + row + r) * kTile + W * part;
    };
    V held[T][R][kParts];
    if (kHeld)
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++)
                for (int part = 0; part < kParts; part++)
                    held[t][r][part] = load<V>(sum_at(t, r, part));

    const int shift = task.matrix.group == 128 ? 2 : task.matrix.group == 64 ? 1 : 0;
    const uint8_t* codes = task.codes;
    // Lines of each block to come that are fetched meanwhile, a share of them for each handful of rows.
    const int64_t handfuls = T > 1 && task.ahead ? ceil_div(task.count, R) : 0;
    const int64_t each = handfuls > 1 ? ceil_div(G::BITS, handfuls) : 0;
    const int64_t line = row / R * each, last_line = std::min<int64_t>(line + each, G::BITS);
    int64_t ahead = 0;  // bytes from task.ahead
    for (int64_t block = 0; block < task.columns / kBlock; block++) {
        I acc[T][R * L][G::HALVES][kParts];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
#pragma GCC unroll 16
            for (int i = 0; i < R * L; i++)
#pragma GCC unroll 2
                for (int half = 0; half < G::HALVES; half++)
#pragma GCC unroll 4
                    for (int part = 0; part < kParts; part++)
                        acc[t][i][half][part] = start_of<G>(*x[i / L], i % L, half);
        dots<G, R, T, L>(codes, task.tile_step, x, acc);
#pragma GCC unroll 8
        for (int at = 0; at < T * G::HALVES; at++) {
            const int t = at / G::HALVES, half = at % G::HALVES;
            const int64_t group = group_of<G>(block, half, shift) * kTile;
#pragma GCC unroll 4
            for (int part = 0; part < kParts; part++) {
                const V scale = load<V>(scales.scale[t] + group + W * part);
                V offset{};
                if (G::OFFSETS) offset = load<V>(scales.offset[t] + group + W * part);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    V sum = held[t][r][part];
                    if (!kHeld) sum = load<V>(sum_at(t, r, part));
                    sum += joined<G, L>([&](int limb) { return acc[t][r * L + limb][half][part]; }) *
                           (scale * x[r]->scale);
                    if (G::OFFSETS) sum += offset * x[r]->total[G::HALVES == 2 ? 1 + half : 0];
                    held[t][r][part] = sum;
                    if (!kHeld) std::memcpy(sum_at(t, r, part), &sum, sizeof sum);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) x[r]++;
        if (L > 1 && G::BITS == 4 && row == 0)
            for (int i = 0; i < G::BITS; i++) __builtin_prefetch(codes + kAhead + i * kLine, 0, 3);
        codes += kTile * kBlock * G::BITS / 8;
        if constexpr (T > 1) {
            for (int64_t i = line; i < last_line; i++)
                for (int t = 0; t < T; t++)
                    __builtin_prefetch(task.ahead + ahead + t * task.tile_step + i * kLine, 0, 2);
            ahead += kLine * G::BITS;
        }
    }
    if (kHeld)
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++)
                for (int part = 0; part < kParts; part++)
                    std::memcpy(sum_at(t, r, part), &held[t][r][part], sizeof(V));
}

// ---- all rows ------------------------------------------------------------------------------------

// Takes R rows as often as they are there, the rest in smaller handfuls.
template <typename G, int R, int T, int L>
void all_rows(const Task& task, const Scales<T>& scales, int64_t row) {
    for (; task.count - row >= R; row += R) one_span<G, R, T, L>(task, scales, row);
    if constexpr (R > 1)
        if (row < task.count) all_rows<G, R - 1, T, L>(task, scales, row);
}

// Rows whose sums registers hold beside each other.
template <typename G, int L>
constexpr int kRows = L == 1 ? kFastRows : std::max(1, kSums / (L * G::HALVES * kParts));

template <typename G, int T, int L>
void some_tiles(const Matrix& m, int64_t tile, const Rows& rows, int64_t first, int64_t count,
                float* out) {
    const int64_t step = tile_bytes(m);
    const uint8_t* span = m.data + tile * step;
    const uint8_t* next = tile + 2 * T <= zk::tiles(m) ? span + T * step : nullptr;
    std::memset(out, 0, 4 * T * count * kTile);
    Scales<T> scales;
    for (int64_t start = 0; start < rows.columns; start += kSpan) {
        const int64_t columns = span_columns(m, start);
        const Parts at = parts(m, columns);
        for (int t = 0; t < T; t++)
            decode_scales(m, span + t * step, columns, scales.scale[t], scales.offset[t]);
        const bool last = start + kSpan >= rows.columns;
        const uint8_t* ahead = last ? next : span + at.end;
        if (ahead != nullptr) ahead += at.codes;
        const uint8_t* codes = span + at.codes;
        const Task task{m, rows, first, count, start, columns, codes, step, out, ahead};
        all_rows<G, kRows<G, L>, T, L>(task, scales, 0);
        span += at.end;
    }
}

// Several tiles at once share the broadcasts of activations.  Where weights are read for few rows it
// is one tile after the other: several streams are slower than one.  Limbs share weights instead.
template <typename G>
void all_tiles(const Matrix& m, int64_t tile, int64_t tiles, bool fast, const Rows& rows,
               int64_t first, int64_t count, float* out) {
    while (tiles > 0) {
        const bool several = kTiles > 1 && fast && tiles >= kTiles && count >= kFastRows;
        const int64_t taken = several ? kTiles : 1;
        const auto product = several ? some_tiles<G, kTiles, 1>
                             : fast  ? some_tiles<G, 1, 1>
                                     : some_tiles<G, 1, kLimbs>;
        product(m, tile, rows, first, count, out);
        tile += taken;
        tiles -= taken;
        out += taken * count * kTile;
    }
}

decltype(&all_tiles<Grid<4, false, false, 1>>) chosen(const Matrix& m) {
    const bool offsets = m.form == kZeroPoints || m.form == kMinima;
    if (m.form == kLevels)
        return m.group == 16 ? all_tiles<Grid<4, true, true, 2>>
                             : all_tiles<Grid<4, true, false, 1>>;
    if (m.group == 16)
        return m.bits == 4 ? all_tiles<Grid<4, false, true, 2>>
                           : all_tiles<Grid<8, false, true, 2>>;
    if (offsets)
        return m.bits == 4 ? all_tiles<Grid<4, false, true, 1>>
                           : all_tiles<Grid<8, false, true, 1>>;
    return m.bits == 4 ? all_tiles<Grid<4, false, false, 1>>
                       : all_tiles<Grid<8, false, false, 1>>;
}

// ---- activations ---------------------------------------------------------------------------------

// Each lane gets the number of the one D beside it.
template <int D>
ZK_INLINE I swapped(I x) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                   8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
#elif defined(__AVX2__)
    return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D);
#else
    return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D);
#endif
}

// x combined over all lanes.
template <typename Both>
ZK_INLINE int32_t over_lanes(I x, Both both) {
    if constexpr (W > 8) x = both(x, swapped<8 % W>(x));
    if constexpr (W > 4) x = both(x, swapped<4 % W>(x));
    x = both(x, swapped<2>(x));
    return both(x, swapped<1>(x))[0];
}

// 32 numbers as limbs of one scale.  What is not finite makes it, and so the result, NaN.
template <int L>
ZK_INLINE void quantize_block(const float* x, Block<L>* out) {
    constexpr int kVectors = kBlock / W;
    constexpr int32_t kOthers = L > 1 ? kLimb * kLimb : 1;
    static_assert(L == 1 || L == 3, "kOthers");
    const auto larger = [](I a, I b) { return a > b ? a : b; };
    const auto sum = [](I a, I b) { return a + b; };
    V value[kVectors];
    I most{};  // magnitudes compare as the integers that have their bits; those of NaN exceed all
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
        value[i] = load<V>(x + W * i);
        most = larger(most, (I)((U)value[i] & 0x7FFFFFFFu));
    }
    const int32_t bits = over_lanes(most, larger);
    const bool finite = bits < 0x7F800000;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    // Far below this 127 / largest overflows, or the last limb's scale is no normal number; such
    // activations count as zero.
    constexpr float kLeast = L > 1 ? 0x1p-100f : 0x1p-120f;
    const float inverse = finite && largest > kLeast ? 127.0f / largest : 0.0f;
    I sums[2][2] = {};  // of the first limb and of the others, of each half
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
        V rest = finite ? value[i] * inverse : V{};
        I(&own)[2] = sums[2 * i / kVectors];
        I others{};
#pragma GCC unroll 4
        for (int limb = 0; limb < L; limb++) {
            const V rounded = (rest + kRoundMagic) - kRoundMagic;
            const I code = __builtin_convertvector(rounded, I);
            store_narrow(code, out->codes[limb] + W * i);
            if (limb == 0) own[0] += code;
            else others = others * kLimb + code;
            rest = (rest - rounded) * float{kLimb};
        }
        own[1] += others;
    }
    out->scale = finite ? largest / (127.0f * float{kOthers}) : __builtin_nanf("");
    int32_t all[2][2];  // of both halves, of the first
#pragma GCC unroll 2
    for (int k = 0; k < (L > 1 ? 2 : 1); k++) {
        all[k][1] = over_lanes(sums[0][k], sum);
        all[k][0] = all[k][1] + over_lanes(sums[1][k], sum);
        for (int i = 0; i < 2; i++) out->start[k][i] = -8 * all[k][i];
    }
    const auto total = [&](int i) { return all[0][i] * kOthers + (L > 1 ? all[1][i] : 0); };
    const int32_t totals[3] = {total(0), total(1), total(0) - total(1)};
    for (int i = 0; i < 3; i++) out->total[i] = out->scale * static_cast<float>(totals[i]);
}

template <int L>
void prepare_row(const float* x, int64_t columns, const Rows& rows, int64_t index) {
    Block<L>* blocks = rows.row<L>(index);
    for (int64_t start = 0; start < rows.columns; start += kBlock, blocks++) {
        const int64_t left = columns - start;
        float last[kBlock] = {};
        if (left > 0 && left < kBlock) std::memcpy(last, x + start, 4 * left);
        quantize_block(left < kBlock ? last : x + start, blocks);
    }
}

}  // namespace

void prepare(const float* x, int64_t columns, bool fast, const Rows& rows, int64_t index) {
    if (fast) prepare_row<1>(x, columns, rows, index);
    else prepare_row<kLimbs>(x, columns, rows, index);
}

void multiply(const Matrix& m, int64_t tile, int64_t tiles, bool fast, const Rows& rows,
              int64_t first, int64_t count, float* out) {
    chosen(m)(m, tile, tiles, fast, rows, first, count, out);
}

void swiglu(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < kTile * count; i += W) {
        const V g = load<V>(gate + i);
        const V result = g / (1.0f + exponential(-g)) * load<V>(up + i);
        std::memcpy(gate + i, &result, sizeof result);
    }
}

uint32_t read(const uint8_t* from, int64_t lines) {
    constexpr int kEach = kLine / sizeof(U), kSums = 4;
    U sum[kSums] = {};
    for (; lines >= kSums; lines -= kSums)
#pragma GCC unroll 16
        for (int i = 0; i < kSums * kEach; i++, from += sizeof(U)) sum[i % kSums] ^= load<U>(from);
    for (int64_t i = 0; i < lines * kEach; i++, from += sizeof(U)) sum[0] ^= load<U>(from);
    const U all = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
    uint32_t result = 0;
    for (int lane = 0; lane < W; lane++) result ^= all[lane];
    return result;
}

}  // namespace ZK_ISA_NAMESPACE
}  // namespace zk
