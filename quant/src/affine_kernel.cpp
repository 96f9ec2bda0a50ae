// Search of the best scale of every group.  This file is compiled once per instruction set, with
// ZQ_ISA_NAMESPACE naming the copy; affine.cpp picks one at run time.
//
// The arithmetic, operation by operation, is defined in zaya_quant/affine.py.  One vector lane is
// one group, so a group never shares a sum with another, no lane is ever added to a neighbour, and
// the number of lanes of the machine does not show in the result.  A tile is W groups, transposed:
// tile[i] holds element i of each.
//
// It must be compiled with -ffp-contract=off: a fused multiply-add rounds once where the reference
// rounds twice.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "weights.h"

namespace zq {
namespace ZQ_ISA_NAMESPACE {
namespace {

constexpr int kSumLanes = 16;  // LANES of affine.py
constexpr float kSmallestScale = 0x1p-126f;

// ---- scales -------------------------------------------------------------------------------------

void store_scale(void* scales, int64_t index, float scale, int32_t dtype) {
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    if (dtype == kFloat32) {
        static_cast<float*>(scales)[index] = scale;
    } else if (dtype == kBFloat16) {
        static_cast<uint16_t*>(scales)[index] = static_cast<uint16_t>(bits >> 16);
    } else {
        static_cast<uint16_t*>(scales)[index] = half_bits(scale);
    }
}

// ---- one tile ---------------------------------------------------------------------------------

struct Tile {
    V* values;            // [padded]: normalised weights, wp
    V* importance;        // [padded], or null
    int64_t padded;       // group length, rounded up to whole chunks of kSumLanes
    V absmax, p, power;   // p = 2^-e, power = 2^e
    V low_side;           // +1 where the most negative weight is the largest, else -1
};

struct Best {
    V error, scale, normal;  // normal = scale * p; scale 0 where nothing was usable
};

// Clamped before it is rounded, which is the same: the bounds are whole numbers.
struct Codes {
    V low, high;
    template <bool HIGH = true, bool LOW = true>
    ZQ_INLINE V of(V w, V inverse) const {
        V code = w * inverse;
        if (HIGH) code = vmin(code, high);
        if (LOW) code = vmax(code, low);
        return vround(code);
    }
};

template <bool WEIGHTED, bool HIGH = true, bool LOW = true>
ZQ_INLINE V error_of(const Tile& tile, V normal, V inverse, Codes codes) {
    Sum<kSumLanes> sum;
    each<kSumLanes>(tile.padded, [&](bool first, int lane, int64_t i) ZQ_LAMBDA {
        const V w = tile.values[i];
        const V rest = w - codes.of<HIGH, LOW>(w, inverse) * normal;
        const V square = rest * rest;
        sum.add(first, lane, WEIGHTED ? square * tile.importance[i] : square);
    });
    return sum.fold();
}

// sum(w k) / sum(k^2): the best scale for the codes of the best scale so far.
template <bool WEIGHTED>
ZQ_INLINE V least_squares(const Tile& tile, const Best& best, Codes codes) {
    const I unset = best.normal == 0.0f;
    const V inverse = select(unset, splat(0.0f), 1.0f / select(unset, splat(1.0f), best.normal));
    Sum<kSumLanes> above, below;
    each<kSumLanes>(tile.padded, [&](bool first, int lane, int64_t i) ZQ_LAMBDA {
        const V w = tile.values[i];
        const V k = codes.of(w, inverse);
        above.add(first, lane, WEIGHTED ? w * k * tile.importance[i] : w * k);
        below.add(first, lane, WEIGHTED ? k * k * tile.importance[i] : k * k);
    });
    return above.fold() / below.fold();
}

template <bool WEIGHTED>
ZQ_INLINE void consider(const Tile& tile, V scale, const Request& r, Codes codes, Best& best) {
    scale = round_scale(scale, r.scale_dtype);
    const V size = magnitude(scale);
    // Comparisons with NaN are false, so NaN is unusable too.
    const I usable = (size >= kSmallestScale) & (size <= largest_scale(r.scale_dtype));
    const V normal = select(usable, scale * tile.p, splat(1.0f));
    const V inverse = 1.0f / normal;
    // Most scales clip nothing, or only above (a code of qmin reaches to qmin - 1/2): a bound on
    // the largest |code| before rounding, over the lanes, tells which clamps cannot act.
    const V reach = magnitude(tile.absmax * tile.p * inverse);
    V error;
    if (!any(reach >= codes.high + 0.5f))
        error = error_of<WEIGHTED, false, false>(tile, normal, inverse, codes);
    else if (!any(reach > 0.5f - codes.low))
        error = error_of<WEIGHTED, true, false>(tile, normal, inverse, codes);
    else
        error = error_of<WEIGHTED>(tile, normal, inverse, codes);
    const I better = usable & (error < best.error);
    best.error = select(better, error, best.error);
    best.scale = select(better, scale, best.scale);
    best.normal = select(better, normal, best.normal);
}

template <bool WEIGHTED>
Best search(const Tile& tile, const Request& r) {
    const int half = 1 << (r.bits - 1);
    const Codes codes{splat(static_cast<float>(-half)), splat(static_cast<float>(half - 1))};
    Best best{splat(__builtin_inff()), V{}, V{}};
    consider<WEIGHTED>(tile, tile.absmax * r.ratios[0], r, codes, best);
    for (int i = 1; i < r.ratio_count; i++) {
        const V scale = tile.absmax * r.ratios[i];
        if (r.both_signs) {
            consider<WEIGHTED>(tile, scale, r, codes, best);
            consider<WEIGHTED>(tile, -scale, r, codes, best);
        } else {
            consider<WEIGHTED>(tile, scale * tile.low_side, r, codes, best);
        }
    }
    for (int i = 0; i < r.refinements; i++) {
        const V ratio = least_squares<WEIGHTED>(tile, best, codes);
        consider<WEIGHTED>(tile, ratio * tile.power, r, codes, best);
    }
    return best;
}

// The W groups of a tile, with the place of each in its row.
struct Groups {
    const char* source[W];
    const float* importance[W];
    int8_t* codes[W];
    int64_t length[W];  // 0 beyond the last group of the matrix
};

// Fills the tile; returns false when it holds a NaN or an infinity.
template <int DTYPE>
ZQ_INLINE bool fill(Tile& tile, const Groups& groups) {
    V low{}, high{}, poison{}, rows[W];
    low = splat(__builtin_inff());
    high = -low;
    for (int64_t start = 0; start < tile.padded; start += W) {
        for (int i = 0; i < W; i++) rows[i] = load<DTYPE>(groups.source[i], start, groups.length[i]);
        transpose(rows);
        for (int i = 0; i < W; i++) {
            low = vmin(low, rows[i]);
            high = vmax(high, rows[i]);
            poison = poison + rows[i] * 0.0f;  // NaN once anything is not finite
            tile.values[start + i] = rows[i];
        }
        if (tile.importance == nullptr) continue;
        for (int i = 0; i < W; i++)
            rows[i] = load<kFloat32>(groups.importance[i], start, groups.length[i]);
        transpose(rows);
        for (int i = 0; i < W; i++) tile.importance[start + i] = rows[i];
    }
    for (int i = 0; i < W; i++)
        if (poison[i] != poison[i]) return false;
    tile.absmax = magnitude(vmax(-low, high));
    tile.low_side = select(-low >= high, splat(1.0f), splat(-1.0f));
    powers_of(tile.absmax, tile.p, tile.power);
    for (int64_t i = 0; i < tile.padded; i++) tile.values[i] = tile.values[i] * tile.p;
    return true;
}

// Codes are computed anew from the source, in its order: cheaper than keeping and transposing.
template <int DTYPE>
ZQ_INLINE void write_codes(const Request& r, const Tile& tile, const Best& best,
                           const Groups& groups) {
    const int half = 1 << (r.bits - 1);
    const Codes codes{splat(static_cast<float>(-half)), splat(static_cast<float>(half - 1))};
    const I unset = best.normal == 0.0f;
    const V inverses = select(unset, splat(0.0f), 1.0f / select(unset, splat(1.0f), best.normal));
    for (int i = 0; i < W; i++) {
        const int64_t length = groups.length[i];
        const V p = splat(tile.p[i]);
        const V inverse = splat(inverses[i]);
        for (int64_t start = 0; start < length; start += W) {
            const V k = codes.of(load<DTYPE>(groups.source[i], start, length) * p, inverse);
            // The low byte of k + magic is k in two's complement.
            const B bytes = low_bytes(to_bits(k + kRoundMagic));
            const int64_t left = length - start;
            if (left >= W) std::memcpy(groups.codes[i] + start, &bytes, W);
            else std::memcpy(groups.codes[i] + start, &bytes, left);
        }
    }
}

template <int DTYPE, bool WEIGHTED>
Result quantize_rows(const Request& r, V* scratch) {
    const int64_t groups_per_row = (r.columns + r.group_length - 1) / r.group_length;
    const int64_t count = r.rows * groups_per_row;
    const int64_t width = DTYPE == kFloat32 ? 4 : 2;
    Tile tile{};
    tile.padded = (r.group_length + kSumLanes - 1) / kSumLanes * kSumLanes;
    tile.values = scratch;
    tile.importance = WEIGHTED ? scratch + tile.padded : nullptr;
    int64_t row = 0, column = 0;  // where the next group starts
    for (int64_t first = 0; first < count; first += W) {
        Groups groups{};
        for (int i = 0; i < W && first + i < count; i++) {
            const int64_t left = r.columns - column, offset = row * r.columns + column;
            groups.source[i] = static_cast<const char*>(r.weight) + offset * width;
            groups.importance[i] = WEIGHTED ? r.importance + column : nullptr;
            groups.codes[i] = r.codes + offset;
            groups.length[i] = left < r.group_length ? left : r.group_length;
            column += r.group_length;
            if (column >= r.columns) column = 0, row++;
        }
        if (!fill<DTYPE>(tile, groups))
            return {kNonFinite, first_non_finite(r.weight, DTYPE, r.rows * r.columns)};
        const Best best = search<WEIGHTED>(tile, r);
        write_codes<DTYPE>(r, tile, best, groups);
        for (int i = 0; i < W && first + i < count; i++) {
            // Far below 1 a group without a scale becomes zeros; far above there is no answer.
            if (best.normal[i] == 0.0f && tile.absmax[i] > 1.0f)
                return {kNotRepresentable, first + i};
            store_scale(r.scales, first + i, best.scale[i], r.scale_dtype);
        }
    }
    return {kOk, -1};
}

template <int DTYPE>
Result quantize_dtype(const Request& r, V* scratch) {
    return r.importance ? quantize_rows<DTYPE, true>(r, scratch)
                        : quantize_rows<DTYPE, false>(r, scratch);
}

}  // namespace

Result quantize(const Request& r) {
    const int64_t padded = (r.group_length + kSumLanes - 1) / kSumLanes * kSumLanes;
    const size_t bytes = sizeof(V) * padded * (r.importance ? 2 : 1);
    // By hand: std::aligned_alloc is missing on some platforms this is meant for.
    void* memory = std::malloc(bytes + sizeof(V));
    if (memory == nullptr) return {kNoMemory, -1};
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory) + sizeof(V) - 1;
    V* scratch = reinterpret_cast<V*>(address / sizeof(V) * sizeof(V));
    Result result = r.dtype == kFloat32    ? quantize_dtype<kFloat32>(r, scratch)
                    : r.dtype == kBFloat16 ? quantize_dtype<kBFloat16>(r, scratch)
                                           : quantize_dtype<kFloat16>(r, scratch);
    std::free(memory);
    return result;
}

}  // namespace ZQ_ISA_NAMESPACE
}  // namespace zq
