// Search of the best ggml block.  Compiled once per instruction set, like affine_kernel.cpp.
//
// The arithmetic, operation by operation, is defined in zaya_quant/block_search.py (and, for plain
// rounding, in zaya_quant/blocks.py).  One vector lane is one sub-group.  A unit is 16 sub-groups,
// so that super-blocks of 8 and of 16 fill it whatever the machine's W is: kParts vectors hold one
// number of each.  The only sums across lanes are those over the sub-groups of a block.
//
// It must be compiled with -ffp-contract=off, as affine_kernel.cpp.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "weights.h"

namespace zq {
namespace ZQ_ISA_NAMESPACE {
namespace {

constexpr int kUnit = 16;
constexpr int kParts = kUnit / W;
constexpr int kLanes = 4;                // LANES of block_search.py
constexpr float kSmallestStep = 0x1p-126f;
constexpr float kSingular = 0x1p-16f;
constexpr float kLargestHalf = 65504.0f;

// ---- the grids ----------------------------------------------------------------------------------

template <int TYPE>
struct Grid {
    static constexpr bool codebook = TYPE == kIQ4_NL || TYPE == kIQ4_XS;
    static constexpr bool super = TYPE == kQ3_K || TYPE == kQ4_K || TYPE == kQ5_K ||
                                  TYPE == kQ6_K || TYPE == kIQ4_XS;
    static constexpr bool sixteen = TYPE == kQ3_K || TYPE == kQ6_K;
    static constexpr bool offset = !codebook && !sixteen;  // value = step k - shift
    static constexpr int length = sixteen ? 16 : 32;  // weights of a sub-group
    static constexpr int groups = sixteen ? 16 : super ? 8 : 1;  // sub-groups of a block
    static constexpr float low = TYPE == kQ3_K ? -4 : TYPE == kQ6_K ? -32 : 0;
    static constexpr float high =
        TYPE == kQ3_K ? 3 : TYPE == kQ5_1 || TYPE == kQ5_K || TYPE == kQ6_K ? 31 : 15;
    // Of the integer that scales a sub-group's steps.
    static constexpr float sub_low = offset ? 0 : TYPE == kQ6_K ? -128 : -32;
    static constexpr float sub_high = offset ? 63 : TYPE == kQ6_K ? 127 : 31;
};

// ---- levels -------------------------------------------------------------------------------------

constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};

constexpr float middle(int i) { return (kLevels[i] + kLevels[i + 1]) / 2; }

// What stands for a level.
template <bool CODE>
constexpr float entry(int i) { return CODE ? static_cast<float>(i) : kLevels[i]; }

#if defined(__AVX512F__)

// Buckets of width 8 have one middle at most.  That of x is b = round(x / 8), -15 .. 15, and its
// place b & 31: the level at its start, and the middle in it, beyond which the next one starts.
// Ties of the rounding lie at 8 b + 4, where no middle is.
template <bool CODE>
struct Buckets {
    alignas(64) float middles[32] = {}, entries[32] = {};

    constexpr Buckets() {
        for (int b = -15, i = 0; b <= 16; b++) {
            entries[b & 31] = entry<CODE>(i);
            const bool within = i < 15 && middle(i) < static_cast<float>(8 * b + 4);
            middles[b & 31] = within ? middle(i++) : __builtin_inff();
        }
    }
};

template <bool CODE>
constexpr Buckets<CODE> kBuckets;

// What stands for the nearest level; a tie goes to the lower.
template <bool CODE>
ZQ_INLINE V nearest_level(V exact) {
    // The low bits of x + magic are round(x).
    const V eighth = vmax(vmin(exact, splat(120.0f)), splat(-120.0f)) * 0.125f;
    const U bucket = to_bits(eighth + kRoundMagic);
    const I beyond = exact > pick32(kBuckets<CODE>.middles, bucket);
    return pick32(kBuckets<CODE>.entries, bucket - (U)beyond);
}

#elif defined(__AVX2__)

// A tree of comparisons.  A lane's path so far is a number, each step doubling it and subtracting
// 1 where x is beyond the middle, so that its low bits are 0, 7, 6, .. from left to right.
template <bool CODE>
struct Tree {
    alignas(32) float third[8] = {}, fourth[8] = {}, lower[8] = {}, upper[8] = {};

    constexpr Tree() {
        for (int i = 0; i < 4; i++) third[-i & 7] = middle(4 * i + 1);
        for (int i = 0; i < 8; i++) {
            fourth[-i & 7] = middle(2 * i);
            lower[-i & 7] = entry<CODE>(2 * i);
            upper[-i & 7] = entry<CODE>(2 * i + 1);
        }
    }
};

template <bool CODE>
constexpr Tree<CODE> kTree;

template <bool CODE>
ZQ_INLINE V nearest_level(V exact) {
    constexpr const Tree<CODE>& tree = kTree<CODE>;
    I path = exact > middle(7);
    path = path + path + (exact > select(path, splat(middle(11)), splat(middle(3))));
    path = path + path + (exact > pick8(tree.third, (U)path));
    const I beyond = exact > pick8(tree.fourth, (U)path);
    return select(beyond, pick8(tree.upper, (U)path), pick8(tree.lower, (U)path));
}

#else

template <bool CODE>
ZQ_INLINE V nearest_level(V exact) {
    V found = splat(entry<CODE>(0));
#pragma GCC unroll 16
    for (int i = 0; i < 15; i++) {
        const float rise = entry<CODE>(i + 1) - entry<CODE>(i);
        found = found + select(exact > middle(i), splat(rise), splat(0.0f));
    }
    return found;
}

#endif

// The k nearest to `exact`, a weight counted in steps.  Clamped before it is rounded, which is the
// same: the bounds are whole numbers.
template <class G>
ZQ_INLINE V nearest(V exact) {
    if constexpr (G::codebook) return nearest_level<false>(exact);
    else return vround(vmax(vmin(exact, splat(G::high)), splat(G::low)));
}

ZQ_INLINE V inverse_of(V step) {
    const I usable = magnitude(step) >= kSmallestStep;
    return select(usable, 1.0f / select(usable, step, splat(1.0f)), splat(0.0f));
}

ZQ_INLINE V clamp(V x, float low, float high) {
    return vmax(vmin(x, splat(high)), splat(low));
}

// ---- sums over the sub-groups of a block --------------------------------------------------------

// Lane i of the result is lane i ^ HALF.
template <int HALF>
ZQ_INLINE V swap(V x) {
#define ZQ_SHUFFLE(...) return __builtin_shufflevector(x, x, __VA_ARGS__)
#if defined(__AVX512F__)
    if constexpr (HALF == 8) ZQ_SHUFFLE(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (HALF == 4) ZQ_SHUFFLE(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if constexpr (HALF == 2) ZQ_SHUFFLE(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    if constexpr (HALF == 1) ZQ_SHUFFLE(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
    if constexpr (HALF == 4) ZQ_SHUFFLE(4, 5, 6, 7, 0, 1, 2, 3);
    if constexpr (HALF == 2) ZQ_SHUFFLE(2, 3, 0, 1, 6, 7, 4, 5);
    if constexpr (HALF == 1) ZQ_SHUFFLE(1, 0, 3, 2, 5, 4, 7, 6);
#else
    if constexpr (HALF == 2) ZQ_SHUFFLE(2, 3, 0, 1);
    if constexpr (HALF == 1) ZQ_SHUFFLE(1, 0, 3, 2);
#endif
#undef ZQ_SHUFFLE
}

// Combines the numbers of the GROUPS sub-groups of every block; all of them get the result.
// `combine` must not mind the order of its two arguments.
template <int GROUPS, class Combine>
ZQ_INLINE void across(V* parts, Combine combine) {
    if constexpr (GROUPS > 1) {
        constexpr int half = GROUPS / 2;
        V next[kParts];
        for (int i = 0; i < kParts; i++) {
            if constexpr (half >= W) next[i] = combine(parts[i], parts[i ^ (half / W)]);
            else next[i] = combine(parts[i], swap<half>(parts[i]));
        }
        for (int i = 0; i < kParts; i++) parts[i] = next[i];
        across<half>(parts, combine);
    }
}

template <class G>
ZQ_INLINE void fold(V* parts) {
    across<G::groups>(parts, [](V a, V b) ZQ_LAMBDA { return a + b; });
}

template <class G>
ZQ_INLINE void largest_of(V* parts) {
    across<G::groups>(parts, [](V a, V b) ZQ_LAMBDA { return vmax(a, b); });
}

// ---- one unit -----------------------------------------------------------------------------------

// W sub-groups.
template <class G>
struct Part {
    V x[G::length];  // normalised weights
    V w[G::length];  // importance
    V low, high;     // of x
    V absmax;        // of the block's weights as they were
    V p, power;      // p = 2^-e, power = 2^e
};

struct Sums {
    V k, kk, xk;
};

// What a file holds, each number in all lanes it concerns; step and shift are normalised.
struct Found {
    V scale, offset, s, n, step, shift;
};

// A number of a file: fp16 at its real size, and normalised.  Adding 0 makes -0 a plain 0.
struct Half {
    V real, normal;
    ZQ_INLINE I finite() const { return magnitude(real) <= kLargestHalf; }
};

template <class G>
ZQ_INLINE Half half(const Part<G>& part, V normal) {
    const V real = round_scale(normal * part.power, kFloat16) + 0.0f;
    return {real, real * part.p};
}

template <class G, bool WEIGHTED>
ZQ_INLINE V error_of(const Part<G>& part, V step, V shift) {
    const V inverse = inverse_of(step);
    Sum<kLanes> sum;
    each<kLanes>(G::length, [&](bool first, int lane, int64_t i) ZQ_LAMBDA {
        const V x = part.x[i];
        V value = step * nearest<G>((G::offset ? x + shift : x) * inverse);
        if (G::offset) value = value - shift;
        const V rest = x - value, square = rest * rest;
        sum.add(first, lane, WEIGHTED ? square * part.w[i] : square);
    });
    return sum.fold();
}

template <class G, bool WEIGHTED>
ZQ_INLINE Sums sums_of(const Part<G>& part, V step, V shift) {
    const V inverse = inverse_of(step);
    Sum<kLanes> sum_k, sum_kk, sum_xk;
    each<kLanes>(G::length, [&](bool first, int lane, int64_t i) ZQ_LAMBDA {
        const V x = part.x[i];
        const V k = nearest<G>((G::offset ? x + shift : x) * inverse);
        if (G::offset) sum_k.add(first, lane, WEIGHTED ? k * part.w[i] : k);
        sum_kk.add(first, lane, WEIGHTED ? k * k * part.w[i] : k * k);
        sum_xk.add(first, lane, WEIGHTED ? x * k * part.w[i] : x * k);
    });
    return {G::offset ? sum_k.fold() : V{}, sum_kk.fold(), sum_xk.fold()};
}

// ---- types with an offset: Q4_1, Q5_1, Q4_K, Q5_K -----------------------------------------------

struct Line {
    V total, mass, step, shift, gain;
    Sums sums;
};

template <class G, bool WEIGHTED>
ZQ_INLINE Line flat_line(const Part<G>& part) {
    Sum<kLanes> total, mass;
    each<kLanes>(G::length, [&](bool first, int lane, int64_t i) ZQ_LAMBDA {
        total.add(first, lane, WEIGHTED ? part.w[i] : splat(1.0f));
        mass.add(first, lane, WEIGHTED ? part.x[i] * part.w[i] : part.x[i]);
    });
    Line line{};
    line.total = total.fold();
    line.mass = mass.fold();
    line.shift = -(line.mass / line.total);
    if (G::super) line.shift = vmax(line.shift, splat(0.0f));
    line.gain = -(line.shift * line.mass);
    return line;
}

template <class G, bool WEIGHTED>
ZQ_INLINE void try_line(const Part<G>& part, Line& line, V step, V shift) {
    const Sums s = sums_of<G, WEIGHTED>(part, step, shift);
    const V size = line.total * s.kk;
    const V determinant = size - s.k * s.k;
    step = (line.total * s.xk - line.mass * s.k) / determinant;
    shift = (s.k * s.xk - line.mass * s.kk) / determinant;
    I fits = determinant > size * kSingular;
    if (G::super) {
        fits &= shift >= 0.0f;
        step = select(fits, step, s.xk / s.kk);
        shift = select(fits, shift, splat(0.0f));
    }
    const V gain = step * s.xk - shift * line.mass;
    I better = (gain > line.gain) & (step >= 0.0f);
    if (!G::super) better &= fits;
    line.step = select(better, step, line.step);
    line.shift = select(better, shift, line.shift);
    line.gain = select(better, gain, line.gain);
    line.sums.k = select(better, s.k, line.sums.k);
    line.sums.kk = select(better, s.kk, line.sums.kk);
    line.sums.xk = select(better, s.xk, line.sums.xk);
}

template <class G, bool WEIGHTED>
Line best_line(const Part<G>& part, const BlockRequest& r) {
    const V low = G::super ? vmin(part.low, splat(0.0f)) : part.low;
    Line line = flat_line<G, WEIGHTED>(part);
    for (int i = 0; i < r.ratio_count; i++)
        try_line<G, WEIGHTED>(part, line, (part.high - low) * r.ratios[i], -low);
    try_line<G, WEIGHTED>(part, line, line.step, line.shift);
    return line;
}

template <class G, bool WEIGHTED>
ZQ_INLINE void try_single(const Part<G>& part, Found& found, V& error, Half step, Half base) {
    const V other = error_of<G, WEIGHTED>(part, step.normal, -base.normal);
    const I better = step.finite() & base.finite() & (other < error);
    error = select(better, other, error);
    found.scale = select(better, step.real, found.scale);
    found.offset = select(better, base.real, found.offset);
    found.step = select(better, step.normal, found.step);
    found.shift = select(better, -base.normal, found.shift);
}

template <class G, bool WEIGHTED>
void search_single(const Part<G>& part, const BlockRequest& r, Found& found) {
    const Line line = best_line<G, WEIGHTED>(part, r);
    V error = error_of<G, WEIGHTED>(part, V{}, V{});
    const Half plain = half(part, (part.high - part.low) / G::high);
    try_single<G, WEIGHTED>(part, found, error, plain, half(part, part.low));
    const Half step = half(part, line.step);
    const V base = (line.mass - step.normal * line.sums.k) / line.total;
    try_single<G, WEIGHTED>(part, found, error, step, half(part, base));
}

struct Predicted {
    V s, n, error;
};

ZQ_INLINE Predicted predict(const Line& line, V s, V d, V dmin, V inverse) {
    const Sums& sums = line.sums;
    const V step = d * s;
    const V n = vround(clamp(((step * sums.k - line.mass) / line.total) * inverse, 0, 63));
    const V shift = dmin * n;
    const V error = step * (step * sums.kk - 2.0f * sums.xk) +
                    shift * (shift * line.total + 2.0f * line.mass);
    return {s, n, error - 2.0f * (step * shift) * sums.k};
}

ZQ_INLINE Predicted nearest_integers(const Line& line, V d, V dmin) {
    const V exact = vmin(line.step * inverse_of(d), splat(63.0f));
    const V s = vround(exact), inverse = inverse_of(dmin);
    const V second = clamp(s + select(exact > s, splat(1.0f), splat(-1.0f)), 0, 63);
    const Predicted first = predict(line, s, d, dmin, inverse);
    const Predicted other = predict(line, second, d, dmin, inverse);
    const I better = other.error < first.error;
    return {select(better, second, s), select(better, other.n, first.n),
            select(better, other.error, first.error)};
}

// The numbers of a super-block while they are searched, d and dmin normalised.
struct State {
    V d, dmin, error;
};

ZQ_INLINE void keep(I better, Found& found, State& state, Half d, Half dmin) {
    found.scale = select(better, d.real, found.scale);
    found.offset = select(better, dmin.real, found.offset);
    state.d = select(better, d.normal, state.d);
    state.dmin = select(better, dmin.normal, state.dmin);
}

template <class G, bool WEIGHTED>
void start_super(const Part<G>* parts, const Line* lines, const BlockRequest& r, Found* found,
                 State* states) {
    V top_step[kParts], top_shift[kParts], least[kParts]{};
    for (int i = 0; i < kParts; i++) top_step[i] = lines[i].step, top_shift[i] = lines[i].shift;
    largest_of<G>(top_step);
    largest_of<G>(top_shift);
    for (int scale = 0; scale < r.scale_count; scale++) {
        Half d[kParts];
        for (int i = 0; i < kParts; i++) d[i] = half(parts[i], top_step[i] * r.scale_ratios[scale]);
        for (int minimum = 0; minimum < r.minimum_count; minimum++) {
            Half dmin[kParts];
            Predicted predicted[kParts];
            V errors[kParts];
            for (int i = 0; i < kParts; i++) {
                dmin[i] = half(parts[i], top_shift[i] * r.minimum_ratios[minimum]);
                predicted[i] = nearest_integers(lines[i], d[i].normal, dmin[i].normal);
                errors[i] = predicted[i].error;
            }
            fold<G>(errors);
            for (int i = 0; i < kParts; i++) {
                const I better = d[i].finite() & dmin[i].finite() & (errors[i] < least[i]);
                least[i] = select(better, errors[i], least[i]);
                keep(better, found[i], states[i], d[i], dmin[i]);
                found[i].s = select(better, predicted[i].s, found[i].s);
                found[i].n = select(better, predicted[i].n, found[i].n);
            }
        }
    }
    for (int i = 0; i < kParts; i++) {
        found[i].step = states[i].d * found[i].s;
        found[i].shift = states[i].dmin * found[i].n;
        states[i].error = error_of<G, WEIGHTED>(parts[i], found[i].step, found[i].shift);
    }
}

template <class G, bool WEIGHTED>
void refit_super(const Part<G>* parts, const Line* lines, const Sums* sums, Found* found,
                 State* states) {
    V ss[kParts], sn[kParts], nn[kParts], xs[kParts], xn[kParts];
    for (int i = 0; i < kParts; i++) {
        const V s = found[i].s, n = found[i].n;
        ss[i] = s * s * sums[i].kk;
        sn[i] = s * n * sums[i].k;
        nn[i] = n * n * lines[i].total;
        xs[i] = s * sums[i].xk;
        xn[i] = n * lines[i].mass;
    }
    for (V* sum : {ss, sn, nn, xs, xn}) fold<G>(sum);
    Half d[kParts], dmin[kParts];
    V errors[kParts], before[kParts], after[kParts];
    for (int i = 0; i < kParts; i++) {
        const V size = ss[i] * nn[i], determinant = size - sn[i] * sn[i];
        const I fits = determinant > size * kSingular;
        d[i] = half(parts[i], select(fits, (xs[i] * nn[i] - sn[i] * xn[i]) / determinant,
                                     (xs[i] + sn[i] * states[i].dmin) / ss[i]));
        dmin[i] = half(parts[i], select(fits, (sn[i] * xs[i] - ss[i] * xn[i]) / determinant,
                                        states[i].dmin));
        errors[i] = error_of<G, WEIGHTED>(parts[i], d[i].normal * found[i].s,
                                          dmin[i].normal * found[i].n);
        before[i] = states[i].error;
        after[i] = errors[i];
    }
    fold<G>(before);
    fold<G>(after);
    for (int i = 0; i < kParts; i++) {
        const I better = d[i].finite() & dmin[i].finite() & (d[i].normal > 0.0f) &
                         (dmin[i].normal >= 0.0f) & (after[i] < before[i]);
        keep(better, found[i], states[i], d[i], dmin[i]);
        found[i].step = states[i].d * found[i].s;
        found[i].shift = states[i].dmin * found[i].n;
        states[i].error = select(better, errors[i], states[i].error);
    }
}

template <class G, bool WEIGHTED>
ZQ_INLINE void try_integers(const Part<G>& part, Found& found, State& state, V s, V n) {
    const V step = state.d * s, shift = state.dmin * n;
    const V error = error_of<G, WEIGHTED>(part, step, shift);
    const I better = error < state.error;
    found.s = select(better, s, found.s);
    found.n = select(better, n, found.n);
    found.step = select(better, step, found.step);
    found.shift = select(better, shift, found.shift);
    state.error = select(better, error, state.error);
}

template <class G, bool WEIGHTED>
void move_super(const Part<G>& part, const Line& line, const Sums& sums, Found& found, State& state,
                int reach) {
    const V s = found.s, n = found.n, start = found.step;
    const V inverse = inverse_of(state.dmin), slope = sums.k / line.total;
    for (int i = 0; i < 2 * reach; i++) {
        const float change = static_cast<float>(i % 2 ? i / 2 + 1 : -(i / 2 + 1));
        const V moved = clamp(s + change, 0, 63);
        const V beside = n + (state.d * moved - start) * slope * inverse;
        try_integers<G, WEIGHTED>(part, found, state, moved, vround(clamp(beside, 0, 63)));
    }
    const V best_s = found.s, best_n = found.n;
    for (float change : {-1.0f, 1.0f})
        try_integers<G, WEIGHTED>(part, found, state, best_s, clamp(best_n + change, 0, 63));
}

template <class G, bool WEIGHTED>
void search_super(const Part<G>* parts, const BlockRequest& r, Found* found) {
    Line lines[kParts];
    State states[kParts]{};
    for (int i = 0; i < kParts; i++) lines[i] = best_line<G, WEIGHTED>(parts[i], r);
    start_super<G, WEIGHTED>(parts, lines, r, found, states);
    for (int turn = 0; turn < r.turn_count; turn++) {
        Sums sums[kParts];
        for (int i = 0; i < kParts; i++)
            sums[i] = sums_of<G, WEIGHTED>(parts[i], found[i].step, found[i].shift);
        refit_super<G, WEIGHTED>(parts, lines, sums, found, states);
        for (int i = 0; i < kParts; i++)
            move_super<G, WEIGHTED>(parts[i], lines[i], sums[i], found[i], states[i],
                                    r.reach[turn]);
    }
}

// ---- types without: Q3_K, Q6_K, IQ4_NL, IQ4_XS --------------------------------------------------

struct Ray {
    V step, gain, kk, xk;
};

template <class G, bool WEIGHTED>
ZQ_INLINE void try_ray(const Part<G>& part, Ray& ray, V step) {
    const Sums s = sums_of<G, WEIGHTED>(part, step, V{});
    step = s.xk / s.kk;
    const V gain = step * s.xk;
    const I better = gain > ray.gain;
    ray.step = select(better, step, ray.step);
    ray.gain = select(better, gain, ray.gain);
    ray.kk = select(better, s.kk, ray.kk);
    ray.xk = select(better, s.xk, ray.xk);
}

template <class G, bool WEIGHTED>
Ray best_ray(const Part<G>& part, const BlockRequest& r) {
    const V side = select(-part.low >= part.high, splat(1.0f), splat(-1.0f));
    const V largest = vmax(-part.low, part.high) * side;
    Ray ray{};
    for (int i = 0; i < r.ratio_count; i++)
        try_ray<G, WEIGHTED>(part, ray, largest * r.ratios[i]);
    try_ray<G, WEIGHTED>(part, ray, ray.step);
    return ray;
}

template <class G, bool WEIGHTED>
void start_scales(const Part<G>* parts, const Ray* rays, const BlockRequest& r, Found* found,
                  V* errors) {
    V low[kParts], high[kParts], least[kParts]{};
    for (int i = 0; i < kParts; i++) low[i] = -rays[i].step, high[i] = rays[i].step;
    largest_of<G>(low);  // of the negated steps
    largest_of<G>(high);
    for (int scale = 0; scale < r.scale_count; scale++) {
        Half d[kParts];
        V s[kParts], steps[kParts], sums[kParts];
        for (int i = 0; i < kParts; i++) {
            const V largest = select(low[i] >= high[i], -low[i], high[i]);
            d[i] = half(parts[i], largest * r.scale_ratios[scale]);
            s[i] = vround(clamp(rays[i].step * inverse_of(d[i].normal), G::sub_low, G::sub_high));
            steps[i] = d[i].normal * s[i];
            sums[i] = steps[i] * (steps[i] * rays[i].kk - 2.0f * rays[i].xk);
        }
        fold<G>(sums);
        for (int i = 0; i < kParts; i++) {
            const I better = d[i].finite() & (sums[i] < least[i]);
            least[i] = select(better, sums[i], least[i]);
            found[i].scale = select(better, d[i].real, found[i].scale);
            found[i].s = select(better, s[i], found[i].s);
            found[i].step = select(better, steps[i], found[i].step);
        }
    }
    for (int i = 0; i < kParts; i++)
        errors[i] = error_of<G, WEIGHTED>(parts[i], found[i].step, V{});
}

template <class G, bool WEIGHTED>
void refit_scales(const Part<G>* parts, Found* found, V* errors) {
    V xs[kParts], ss[kParts], others[kParts], before[kParts], after[kParts], steps[kParts];
    for (int i = 0; i < kParts; i++) {
        const Sums sums = sums_of<G, WEIGHTED>(parts[i], found[i].step, V{});
        xs[i] = found[i].s * sums.xk;
        ss[i] = found[i].s * found[i].s * sums.kk;
    }
    fold<G>(xs);
    fold<G>(ss);
    Half d[kParts];
    for (int i = 0; i < kParts; i++) {
        d[i] = half(parts[i], xs[i] / ss[i]);
        steps[i] = d[i].normal * found[i].s;
        others[i] = error_of<G, WEIGHTED>(parts[i], steps[i], V{});
        before[i] = errors[i];
        after[i] = others[i];
    }
    fold<G>(before);
    fold<G>(after);
    for (int i = 0; i < kParts; i++) {
        const I better = d[i].finite() & (after[i] < before[i]);
        found[i].scale = select(better, d[i].real, found[i].scale);
        found[i].step = select(better, steps[i], found[i].step);
        errors[i] = select(better, others[i], errors[i]);
    }
}

template <class G, bool WEIGHTED>
void move_scales(const Part<G>& part, Found& found, V& error, int reach) {
    const V s = found.s, d = found.scale * part.p;
    for (int i = 0; i < 2 * reach; i++) {
        const float change = static_cast<float>(i % 2 ? i / 2 + 1 : -(i / 2 + 1));
        const V moved = clamp(s + change, G::sub_low, G::sub_high), step = d * moved;
        const V other = error_of<G, WEIGHTED>(part, step, V{});
        const I better = other < error;
        found.s = select(better, moved, found.s);
        found.step = select(better, step, found.step);
        error = select(better, other, error);
    }
}

template <class G, bool WEIGHTED>
void search_scales(const Part<G>* parts, const BlockRequest& r, Found* found) {
    Ray rays[kParts];
    V errors[kParts];
    for (int i = 0; i < kParts; i++) rays[i] = best_ray<G, WEIGHTED>(parts[i], r);
    start_scales<G, WEIGHTED>(parts, rays, r, found, errors);
    for (int turn = 0; turn < r.turn_count; turn++) {
        refit_scales<G, WEIGHTED>(parts, found, errors);
        for (int i = 0; i < kParts; i++)
            move_scales<G, WEIGHTED>(parts[i], found[i], errors[i], r.reach[turn]);
    }
}

template <class G, bool WEIGHTED>
void search_levels(const Part<G>& part, const BlockRequest& r, Found& found) {
    const Half step = half(part, best_ray<G, WEIGHTED>(part, r).step);
    found.scale = step.real;
    found.step = step.normal;
}

// ---- a matrix -----------------------------------------------------------------------------------

// Fills a part with `count` sub-groups that follow each other from flat index `first` on; the rest
// of the lanes become zeros.  Returns false at a NaN or an infinity.
template <class G, int DTYPE, bool WEIGHTED>
bool fill(Part<G>& part, const BlockRequest& r, int64_t first, int64_t count) {
    constexpr int64_t width = DTYPE == kFloat32 ? 4 : 2;
    const char* weight = static_cast<const char*>(r.weight);
    V low = splat(__builtin_inff()), high = -low, poison{}, rows[W];
    for (int start = 0; start < G::length; start += W) {
        for (int i = 0; i < W; i++) {
            const int64_t offset = (first + i) * G::length + start;
            rows[i] = i < count ? load<DTYPE>(weight + offset * width, 0, W) : V{};
        }
        transpose(rows);
        for (int i = 0; i < W; i++) {
            low = vmin(low, rows[i]);
            high = vmax(high, rows[i]);
            poison = poison + rows[i] * 0.0f;  // NaN once anything is not finite
            part.x[start + i] = rows[i];
        }
        if (!WEIGHTED) continue;
        for (int i = 0; i < W; i++) {
            const int64_t offset = (first + i) * G::length % r.columns + start;
            rows[i] = i < count ? load<kFloat32>(r.importance + offset, 0, W) : V{};
        }
        transpose(rows);
        for (int i = 0; i < W; i++) part.w[start + i] = rows[i];
    }
    part.low = low;
    part.high = high;
    return !any(poison != poison);
}

template <class G>
void normalise(Part<G>* parts) {
    V absmax[kParts];
    for (int i = 0; i < kParts; i++) absmax[i] = magnitude(vmax(-parts[i].low, parts[i].high));
    largest_of<G>(absmax);
    for (int i = 0; i < kParts; i++) {
        Part<G>& part = parts[i];
        part.absmax = absmax[i];
        powers_of(part.absmax, part.p, part.power);
        part.low = part.low * part.p;
        part.high = part.high * part.p;
        for (int j = 0; j < G::length; j++) part.x[j] = part.x[j] * part.p;
    }
}

// Computed anew from the source, in its order: cheaper than keeping and transposing.
template <class G, int DTYPE>
void write_codes(const BlockRequest& r, const Part<G>& part, const Found& found, int64_t first,
                 int64_t count) {
    constexpr int64_t width = DTYPE == kFloat32 ? 4 : 2;
    const V inverses = inverse_of(found.step);
    for (int i = 0; i < W && i < count; i++) {
        const V p = splat(part.p[i]), shift = splat(found.shift[i]), inverse = splat(inverses[i]);
        for (int start = 0; start < G::length; start += W) {
            const int64_t offset = (first + i) * G::length + start;
            const V x = load<DTYPE>(static_cast<const char*>(r.weight) + offset * width, 0, W) * p;
            const V exact = (G::offset ? x + shift : x) * inverse;
            V k;
            if constexpr (G::codebook) k = nearest_level<true>(exact);
            else k = nearest<G>(exact);
            // The low byte of k + magic is k in two's complement.
            const B bytes = low_bytes(to_bits(k + kRoundMagic));
            std::memcpy(r.codes + offset, &bytes, W);
        }
    }
}

// Returns the flat index of a block without usable scales, or -1.
template <class G>
int64_t write_numbers(const BlockRequest& r, const Part<G>& part, const Found& found, int64_t first,
                      int64_t count) {
    for (int i = 0; i < W && i < count; i++) {
        const int64_t group = first + i, block = group / G::groups;
        if (G::super) r.sub_scales[group] = static_cast<uint8_t>(static_cast<int>(found.s[i]));
        if (G::super && G::offset) r.sub_mins[group] = static_cast<uint8_t>(found.n[i]);
        if (group % G::groups) continue;
        const bool nothing = found.scale[i] == 0.0f && found.offset[i] == 0.0f;
        // Zeros are a choice as long as fp16 could have held scales.
        if (nothing && part.absmax[i] > kLargestHalf) return block;
        if (!(magnitude(found.scale)[i] <= kLargestHalf)) return block;
        r.scales[block] = half_bits(found.scale[i]);
        if (G::offset) r.offsets[block] = half_bits(found.offset[i]);
    }
    return -1;
}

template <class G, bool WEIGHTED>
void search(const Part<G>* parts, const BlockRequest& r, Found* found) {
    if constexpr (G::super && G::offset) search_super<G, WEIGHTED>(parts, r, found);
    else if constexpr (G::super) search_scales<G, WEIGHTED>(parts, r, found);
    else if constexpr (G::offset)
        for (int i = 0; i < kParts; i++) search_single<G, WEIGHTED>(parts[i], r, found[i]);
    else
        for (int i = 0; i < kParts; i++) search_levels<G, WEIGHTED>(parts[i], r, found[i]);
}

template <class G, int DTYPE, bool WEIGHTED>
Result quantize_units(const BlockRequest& r) {
    const int64_t groups = r.rows * r.columns / G::length;
    for (int64_t first = 0; first < groups; first += kUnit) {
        Part<G> parts[kParts];
        Found found[kParts]{};
        for (int i = 0; i < kParts; i++)
            if (!fill<G, DTYPE, WEIGHTED>(parts[i], r, first + i * W, groups - first - i * W))
                return {kNonFinite, first_non_finite(r.weight, DTYPE, r.rows * r.columns)};
        normalise(parts);
        search<G, WEIGHTED>(parts, r, found);
        for (int i = 0; i < kParts; i++) {
            const int64_t start = first + i * W, count = groups - start;
            const int64_t bad = write_numbers(r, parts[i], found[i], start, count);
            if (bad >= 0) return {kNotRepresentable, bad};
            write_codes<G, DTYPE>(r, parts[i], found[i], start, count);
        }
    }
    return {kOk, -1};
}

template <class G>
Result quantize_type(const BlockRequest& r) {
    const bool weighted = r.importance != nullptr;
    if (r.dtype == kFloat32)
        return weighted ? quantize_units<G, kFloat32, true>(r)
                        : quantize_units<G, kFloat32, false>(r);
    if (r.dtype == kBFloat16)
        return weighted ? quantize_units<G, kBFloat16, true>(r)
                        : quantize_units<G, kBFloat16, false>(r);
    return weighted ? quantize_units<G, kFloat16, true>(r) : quantize_units<G, kFloat16, false>(r);
}

// ---- plain rounding -----------------------------------------------------------------------------

constexpr int kBlock = 32;
constexpr int kVectors = kBlock / W;

template <int HALF = W / 2>
ZQ_INLINE float largest_lane(V x) {
    x = vmax(x, swap<HALF>(x));
    if constexpr (HALF > 1) return largest_lane<HALF / 2>(x);
    else return x[0];
}

// Exact for 0 <= x < 2^22.
ZQ_INLINE V vfloor(V x) {
    const V rounded = vround(x);
    return rounded - select(rounded > x, splat(1.0f), splat(0.0f));
}

// 1 / scale; 0 where that is infinite: such a scale is 0 in fp16, whatever the codes.
ZQ_INLINE float reciprocal(float scale) {
    const float inverse = 1.0f / scale;
    return __builtin_isinf(inverse) ? 0.0f : inverse;
}

// The first weight of the largest magnitude, with its sign.
ZQ_INLINE float first_largest(const V* x, float low, float high) {
    if (high != -low) return high > -low ? high : low;
    for (int i = 0; i < kBlock; i++) {
        const float value = x[i / W][i % W];
        if (value == high || value == low) return value;
    }
    return 0.0f;
}

// Rounds to fp16 and stores; false when it overflows.
ZQ_INLINE bool store_half(uint16_t* target, float value) {
    const float rounded = round_scale(splat(value), kFloat16)[0];
    *target = half_bits(rounded);
    return rounded <= kLargestHalf && rounded >= -kLargestHalf;
}

// One block of finite weights; returns whether its scales are representable.
template <int TYPE>
ZQ_INLINE bool plain_block(const BlockRequest& r, int64_t block, const V* x, float low,
                           float high) {
    constexpr bool minimum = TYPE == kQ4_1 || TYPE == kQ5_1;
    constexpr bool five = TYPE == kQ5_0 || TYPE == kQ5_1;
    constexpr float half = five ? 16 : 8, top = 2 * half - 1;
    const float absmax = high > -low ? high : 0.0f - low;  // never -0
    float scale;
    if (TYPE == kQ8_0) scale = absmax / 127.0f;
    else if (minimum) scale = (high - low) / top;
    else scale = first_largest(x, low, high) / -half;
    const V inverse = splat(reciprocal(scale));
    for (int i = 0; i < kVectors; i++) {
        V code;
        if (TYPE == kQ8_0) {
            const V exact = x[i] * inverse, size = magnitude(exact), whole = vfloor(size);
            code = whole + select(size - whole >= 0.5f, splat(1.0f), splat(0.0f));
            code = from_bits(to_bits(code) | (to_bits(exact) & 0x80000000u));
        } else {
            const V shifted =
                minimum ? (x[i] - low) * inverse + 0.5f : x[i] * inverse + (half + 0.5f);
            code = vfloor(clamp(shifted, 0, top + 0.5f)) - (minimum ? 0.0f : half);
        }
        const B bytes = low_bytes(to_bits(code + kRoundMagic));
        std::memcpy(r.codes + block * kBlock + i * W, &bytes, W);
    }
    const bool fits = store_half(r.scales + block, scale);
    return minimum ? fits & store_half(r.offsets + block, low + 0.0f) : fits;
}

template <int TYPE, int DTYPE>
Result plain_rows(const BlockRequest& r) {
    constexpr int64_t width = DTYPE == kFloat32 ? 4 : 2;
    const int64_t blocks = r.rows * r.columns / kBlock;
    for (int64_t block = 0; block < blocks; block++) {
        const char* source = static_cast<const char*>(r.weight) + block * kBlock * width;
        V x[kVectors], low, high, poison{};
        for (int i = 0; i < kVectors; i++) {
            x[i] = load<DTYPE>(source, i * W, kBlock);
            low = i ? vmin(low, x[i]) : x[i];
            high = i ? vmax(high, x[i]) : x[i];
            poison = poison + x[i] * 0.0f;
        }
        if (any(poison != poison))
            return {kNonFinite, first_non_finite(r.weight, DTYPE, r.rows * r.columns)};
        if (!plain_block<TYPE>(r, block, x, -largest_lane(-low), largest_lane(high)))
            return {kNotRepresentable, block};
    }
    return {kOk, -1};
}

template <int TYPE>
Result plain_type(const BlockRequest& r) {
    return r.dtype == kFloat32    ? plain_rows<TYPE, kFloat32>(r)
           : r.dtype == kBFloat16 ? plain_rows<TYPE, kBFloat16>(r)
                                  : plain_rows<TYPE, kFloat16>(r);
}

}  // namespace

Result search_blocks(const BlockRequest& r) {
    switch (r.type) {
        case kQ4_1: return quantize_type<Grid<kQ4_1>>(r);
        case kQ5_1: return quantize_type<Grid<kQ5_1>>(r);
        case kQ3_K: return quantize_type<Grid<kQ3_K>>(r);
        case kQ4_K: return quantize_type<Grid<kQ4_K>>(r);
        case kQ5_K: return quantize_type<Grid<kQ5_K>>(r);
        case kQ6_K: return quantize_type<Grid<kQ6_K>>(r);
        case kIQ4_NL: return quantize_type<Grid<kIQ4_NL>>(r);
        case kIQ4_XS: return quantize_type<Grid<kIQ4_XS>>(r);
        default: return {kNoSuchType, -1};
    }
}

Result plain_blocks(const BlockRequest& r) {
    switch (r.type) {
        case kQ4_0: return plain_type<kQ4_0>(r);
        case kQ4_1: return plain_type<kQ4_1>(r);
        case kQ5_0: return plain_type<kQ5_0>(r);
        case kQ5_1: return plain_type<kQ5_1>(r);
        case kQ8_0: return plain_type<kQ8_0>(r);
        default: return {kNoSuchType, -1};
    }
}

}  // namespace ZQ_ISA_NAMESPACE
}  // namespace zq
