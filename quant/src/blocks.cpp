// Entry points of ggml block types, and their bytes.
//
// Where everything lies in a block is described at the top of zaya_quant/blocks.py.
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "zaya_quant.h"

namespace zq {
namespace {

// The layout of a type: weights and bytes of a block, what is added to a code before it is stored,
// the bytes of `low` that hold one run of codes, and the bits of a code above the low four.
template <int TYPE>
struct Layout {
    static constexpr bool super = TYPE == kQ4_K || TYPE == kQ5_K || TYPE == kQ6_K;
    static constexpr bool minimum =
        TYPE == kQ4_1 || TYPE == kQ5_1 || TYPE == kQ4_K || TYPE == kQ5_K;
    static constexpr int weights = super ? 256 : 32;
    static constexpr int high_bits =
        TYPE == kQ6_K                                       ? 2
        : TYPE == kQ5_0 || TYPE == kQ5_1 || TYPE == kQ5_K ? 1
                                                            : 0;
    static constexpr int bias = TYPE == kQ4_0 ? 8 : TYPE == kQ5_0 ? 16 : TYPE == kQ6_K ? 32 : 0;
    static constexpr int run = TYPE == kQ6_K ? 64 : super ? 32 : 16;
    static constexpr int low = TYPE == kQ8_0 ? weights : weights / 2;
    static constexpr int high = weights * high_bits / 8;
    static constexpr int groups = TYPE == kQ6_K ? 16 : 8;
    static constexpr int sub = TYPE == kQ6_K ? 16 : super ? 12 : 0;
    // Where parts start: Q6_K has its numbers behind its codes.
    static constexpr int at_scale = TYPE == kQ6_K ? low + high + sub : 0;
    static constexpr int at_minimum = 2;
    static constexpr int at_sub = TYPE == kQ6_K ? low + high : 4;
    static constexpr int at_high = TYPE == kQ6_K ? low : (minimum ? 4 : 2) + sub;
    static constexpr int at_low = TYPE == kQ6_K ? 0 : at_high + high;
    static constexpr int size = low + high + sub + (minimum ? 4 : 2);
};

static_assert(Layout<kQ4_0>::size == 18 && Layout<kQ4_1>::size == 20, "");
static_assert(Layout<kQ5_0>::size == 22 && Layout<kQ5_1>::size == 24, "");
static_assert(Layout<kQ8_0>::size == 34 && Layout<kIQ4_NL>::size == 18, "");
static_assert(Layout<kQ4_K>::size == 144 && Layout<kQ5_K>::size == 176, "");
static_assert(Layout<kQ6_K>::size == 210, "");

// Returns the bits that lie outside a code of this type.
template <class L>
inline uint8_t pack_codes(const uint8_t* codes, uint8_t* block) {
    if (L::low == L::weights) {
        std::memcpy(block + L::at_low, codes, L::weights);
        return 0;
    }
    uint8_t stored[L::weights], used = 0;
    for (int i = 0; i < L::weights; i++) {
        stored[i] = static_cast<uint8_t>(codes[i] + L::bias);
        used |= stored[i];
    }
    for (int run = 0; run < L::low / L::run; run++) {
        const uint8_t* source = stored + 2 * L::run * run;
        uint8_t* target = block + L::at_low + L::run * run;
        for (int i = 0; i < L::run; i++)
            target[i] = static_cast<uint8_t>((source[i] & 15) | (source[L::run + i] << 4));
    }
    if (L::high_bits && L::weights == 32) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; i++) bits |= static_cast<uint32_t>(stored[i] >> 4 & 1) << i;
        std::memcpy(block + L::at_high, &bits, 4);
    } else if (L::high_bits) {
        constexpr int fields = 8 / (L::high_bits ? L::high_bits : 1);
        for (int part = 0; part < L::high / 32; part++) {
            uint8_t* target = block + L::at_high + 32 * part;
            for (int i = 0; i < 32; i++) {
                unsigned byte = 0;
                for (int field = 0; field < fields; field++)
                    byte |= (stored[32 * (fields * part + field) + i] >> 4) << (L::high_bits * field);
                target[i] = static_cast<uint8_t>(byte);
            }
        }
    }
    return static_cast<uint8_t>(used & ~((1 << (4 + L::high_bits)) - 1));
}

template <class L>
inline void unpack_codes(const uint8_t* block, uint8_t* codes) {
    if (L::low == L::weights) {
        std::memcpy(codes, block + L::at_low, L::weights);
        return;
    }
    uint8_t stored[L::weights];
    for (int run = 0; run < L::low / L::run; run++) {
        const uint8_t* source = block + L::at_low + L::run * run;
        uint8_t* target = stored + 2 * L::run * run;
        for (int i = 0; i < L::run; i++) {
            target[i] = source[i] & 15;
            target[L::run + i] = source[i] >> 4;
        }
    }
    if (L::high_bits && L::weights == 32) {
        uint32_t bits;
        std::memcpy(&bits, block + L::at_high, 4);
        for (int i = 0; i < 32; i++) stored[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
    } else if (L::high_bits) {
        constexpr int fields = 8 / (L::high_bits ? L::high_bits : 1);
        constexpr int mask = (1 << L::high_bits) - 1;
        for (int part = 0; part < L::high / 32; part++) {
            const uint8_t* source = block + L::at_high + 32 * part;
            for (int field = 0; field < fields; field++) {
                uint8_t* target = stored + 32 * (fields * part + field);
                for (int i = 0; i < 32; i++)
                    target[i] |= static_cast<uint8_t>((source[i] >> (L::high_bits * field) & mask) << 4);
            }
        }
    }
    for (int i = 0; i < L::weights; i++) codes[i] = static_cast<uint8_t>(stored[i] - L::bias);
}

// Eight scales and eight minima of six bits each.  Returns the bits above them.
inline uint8_t pack_six(const uint8_t* scales, const uint8_t* minima, uint8_t* target) {
    uint8_t used = 0;
    for (int i = 0; i < 4; i++) {
        target[i] = static_cast<uint8_t>(scales[i] | (scales[4 + i] >> 4) << 6);
        target[4 + i] = static_cast<uint8_t>(minima[i] | (minima[4 + i] >> 4) << 6);
        target[8 + i] = static_cast<uint8_t>((scales[4 + i] & 15) | minima[4 + i] << 4);
        used |= scales[i] | scales[4 + i] | minima[i] | minima[4 + i];
    }
    return used & 0xC0;
}

inline void unpack_six(const uint8_t* source, uint8_t* scales, uint8_t* minima) {
    for (int i = 0; i < 4; i++) {
        scales[i] = source[i] & 63;
        minima[i] = source[4 + i] & 63;
        scales[4 + i] = static_cast<uint8_t>((source[8 + i] & 15) | (source[i] >> 6) << 4);
        minima[4 + i] = static_cast<uint8_t>(source[8 + i] >> 4 | (source[4 + i] >> 6) << 4);
    }
}

// Returns whether every code and integer fits.
template <int TYPE>
bool pack(const Blocks& b) {
    using L = Layout<TYPE>;
    uint8_t outside = 0;
    for (int64_t i = 0; i < b.count; i++) {
        uint8_t* block = b.bytes + i * L::size;
        outside |= pack_codes<L>(b.codes + i * L::weights, block);
        std::memcpy(block + L::at_scale, b.scales + i, 2);
        if (L::minimum) std::memcpy(block + L::at_minimum, b.offsets + i, 2);
        if (L::super && L::minimum)
            outside |= pack_six(b.sub_scales + i * L::groups, b.sub_mins + i * L::groups,
                                block + L::at_sub);
        else if (L::super)
            std::memcpy(block + L::at_sub, b.sub_scales + i * L::groups, L::groups);
    }
    return outside == 0;
}

template <int TYPE>
bool unpack(const Blocks& b) {
    using L = Layout<TYPE>;
    for (int64_t i = 0; i < b.count; i++) {
        const uint8_t* block = b.bytes + i * L::size;
        unpack_codes<L>(block, b.codes + i * L::weights);
        std::memcpy(b.scales + i, block + L::at_scale, 2);
        if (L::minimum) std::memcpy(b.offsets + i, block + L::at_minimum, 2);
        if (L::super && L::minimum)
            unpack_six(block + L::at_sub, b.sub_scales + i * L::groups, b.sub_mins + i * L::groups);
        else if (L::super)
            std::memcpy(b.sub_scales + i * L::groups, block + L::at_sub, L::groups);
    }
    return true;
}

using Convert = bool (*)(const Blocks&);
constexpr Convert kPack[] = {pack<kQ4_0>, pack<kQ4_1>, pack<kQ5_0>, pack<kQ5_1>, pack<kQ8_0>,
                             pack<kQ4_K>, pack<kQ5_K>, pack<kQ6_K>, pack<kIQ4_NL>};
constexpr Convert kUnpack[] = {unpack<kQ4_0>, unpack<kQ4_1>, unpack<kQ5_0>,
                               unpack<kQ5_1>, unpack<kQ8_0>, unpack<kQ4_K>,
                               unpack<kQ5_K>, unpack<kQ6_K>, unpack<kIQ4_NL>};

}  // namespace
}  // namespace zq

// Blocks by the search (plain = 0) or by plain rounding; `isa` as in zq_quantize.
ZQ_EXPORT int32_t zq_quantize_blocks(const zq::BlockRequest* request, int32_t plain, int32_t isa,
                                     int64_t* index) {
    const zq::Result result = plain ? ZQ_DISPATCH(isa, plain_blocks, *request)
                                    : ZQ_DISPATCH(isa, search_blocks, *request);
    *index = result.index;
    return result.status;
}

// Returns 1, or 0 when a code or an integer of a sub-group does not fit.
ZQ_EXPORT int32_t zq_pack_blocks(const zq::Blocks* blocks) {
    return zq::kPack[blocks->type](*blocks);
}

ZQ_EXPORT void zq_unpack_blocks(const zq::Blocks* blocks) { zq::kUnpack[blocks->type](*blocks); }
