// Entry points of ggml block types, and their bytes.
//
// Where everything lies in a block is described at the top of zaya_quant/blocks.py.
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "zaya_quant.h"

namespace zq {
namespace {

#define ZQ_INLINE inline __attribute__((always_inline))

// Numbers of `bits` bits that share bytes, from byte `at` of a block on: byte j of every run of
// `run` bytes holds the elements j, j + run, j + 2 run, .. of that run's, the first lowest.  Those
// of run 1 are one little-endian word.
struct Fields {
    int bits, run, at;
};

// `count` integers in two parts: of integer + bias, the bits of `low` and those above.
struct Parts {
    int count, bias;
    Fields low, high;
};

// The layout of a type: bytes of a block; where its fp16 numbers are; its codes; its sub-scales, but
// where they come with minima only their count, and where the `twelve` bytes of both are.  -1: there
// is none.
struct Layout {
    int size, scale, offset;
    Parts codes, sub;
    int twelve;
};

// In the order of BlockType.
constexpr Layout kLayouts[] = {
    // Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
    {18, 0, -1, {32, 8, {4, 16, 2}, {}}, {}, -1},
    {20, 0, 2, {32, 0, {4, 16, 4}, {}}, {}, -1},
    {22, 0, -1, {32, 16, {4, 16, 6}, {1, 1, 2}}, {}, -1},
    {24, 0, 2, {32, 0, {4, 16, 8}, {1, 1, 4}}, {}, -1},
    {34, 0, -1, {32, 0, {8, 32, 2}, {}}, {}, -1},
    // Q3_K, Q4_K, Q5_K, Q6_K
    {110, 108, -1, {256, 4, {2, 32, 32}, {1, 32, 0}}, {16, 32, {4, 8, 96}, {2, 4, 104}}, -1},
    {144, 0, 2, {256, 0, {4, 32, 16}, {}}, {8, 0, {}, {}}, 4},
    {176, 0, 2, {256, 0, {4, 32, 48}, {1, 32, 16}}, {8, 0, {}, {}}, 4},
    {210, 208, -1, {256, 32, {4, 64, 0}, {2, 32, 128}}, {16, 0, {8, 16, 192}, {}}, -1},
    // IQ4_NL, IQ4_XS
    {18, 0, -1, {32, 0, {4, 16, 2}, {}}, {}, -1},
    {136, 0, -1, {256, 0, {4, 16, 8}, {}}, {8, 32, {4, 1, 4}, {2, 1, 2}}, -1},
};

// Writes the field of every value that starts at bit `from` of it.
ZQ_INLINE void join(const uint8_t* values, int count, int from, Fields f, uint8_t* block) {
    const int fields = 8 / f.bits, mask = (1 << f.bits) - 1;
    if (f.run == 1) {
        uint32_t word = 0;
        for (int i = 0; i < count; i++)
            word |= static_cast<uint32_t>(values[i] >> from & mask) << f.bits * i;
        std::memcpy(block + f.at, &word, count / fields);
        return;
    }
    for (int run = 0; run < count / fields; run += f.run)
        for (int i = 0; i < f.run; i++) {
            const uint8_t* source = values + fields * run + i;
            int byte = 0;
            for (int field = 0; field < fields; field++)
                byte |= (source[f.run * field] >> from & mask) << f.bits * field;
            block[f.at + run + i] = static_cast<uint8_t>(byte);
        }
}

// The lowest field comes first, and so need not find zeros.
ZQ_INLINE void put(uint8_t& value, int from, int field) {
    value = static_cast<uint8_t>(from ? value | field << from : field);
}

// The inverse of `join` of one field.
ZQ_INLINE void split(const uint8_t* block, int count, int from, Fields f, uint8_t* values) {
    const int fields = 8 / f.bits, mask = (1 << f.bits) - 1;
    if (f.run == 1) {
        uint32_t word = 0;
        std::memcpy(&word, block + f.at, count / fields);
        for (int i = 0; i < count; i++)
            put(values[i], from, static_cast<int>(word >> f.bits * i) & mask);
        return;
    }
    for (int run = 0; run < count / fields; run += f.run)
        for (int field = 0; field < fields; field++)
            for (int i = 0; i < f.run; i++)
                put(values[fields * run + f.run * field + i], from,
                    block[f.at + run + i] >> f.bits * field & mask);
}

// Returns the bits that lie outside the integers of this type.
ZQ_INLINE uint8_t pack_parts(const uint8_t* values, Parts p, uint8_t* block) {
    uint8_t stored[256], used = 0;
    for (int i = 0; i < p.count; i++) {
        stored[i] = static_cast<uint8_t>(values[i] + p.bias);
        used |= stored[i];
    }
    join(stored, p.count, 0, p.low, block);
    if (p.high.bits) join(stored, p.count, p.low.bits, p.high, block);
    return static_cast<uint8_t>(used >> (p.low.bits + p.high.bits));
}

ZQ_INLINE void unpack_parts(const uint8_t* block, Parts p, uint8_t* values) {
    uint8_t stored[256];
    split(block, p.count, 0, p.low, stored);
    if (p.high.bits) split(block, p.count, p.low.bits, p.high, stored);
    for (int i = 0; i < p.count; i++) values[i] = static_cast<uint8_t>(stored[i] - p.bias);
}

// Eight scales and eight minima of six bits each.  Returns the bits above them.
inline uint8_t pack_twelve(const uint8_t* scales, const uint8_t* minima, uint8_t* target) {
    uint8_t used = 0;
    for (int i = 0; i < 4; i++) {
        target[i] = static_cast<uint8_t>(scales[i] | (scales[4 + i] >> 4) << 6);
        target[4 + i] = static_cast<uint8_t>(minima[i] | (minima[4 + i] >> 4) << 6);
        target[8 + i] = static_cast<uint8_t>((scales[4 + i] & 15) | minima[4 + i] << 4);
        used |= scales[i] | scales[4 + i] | minima[i] | minima[4 + i];
    }
    return used & 0xC0;
}

inline void unpack_twelve(const uint8_t* source, uint8_t* scales, uint8_t* minima) {
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
    constexpr Layout l = kLayouts[TYPE];
    uint8_t outside = 0;
    for (int64_t i = 0; i < b.count; i++) {
        uint8_t* block = b.bytes + i * l.size;
        outside |= pack_parts(b.codes + i * l.codes.count, l.codes, block);
        std::memcpy(block + l.scale, b.scales + i, 2);
        if (l.offset >= 0) std::memcpy(block + l.offset, b.offsets + i, 2);
        const int64_t sub = i * l.sub.count;
        if (l.twelve >= 0)
            outside |= pack_twelve(b.sub_scales + sub, b.sub_mins + sub, block + l.twelve);
        else if (l.sub.count)
            outside |= pack_parts(b.sub_scales + sub, l.sub, block);
    }
    return outside == 0;
}

template <int TYPE>
bool unpack(const Blocks& b) {
    constexpr Layout l = kLayouts[TYPE];
    for (int64_t i = 0; i < b.count; i++) {
        const uint8_t* block = b.bytes + i * l.size;
        unpack_parts(block, l.codes, b.codes + i * l.codes.count);
        std::memcpy(b.scales + i, block + l.scale, 2);
        if (l.offset >= 0) std::memcpy(b.offsets + i, block + l.offset, 2);
        const int64_t sub = i * l.sub.count;
        if (l.twelve >= 0)
            unpack_twelve(block + l.twelve, b.sub_scales + sub, b.sub_mins + sub);
        else if (l.sub.count)
            unpack_parts(block, l.sub, b.sub_scales + sub);
    }
    return true;
}

using Convert = bool (*)(const Blocks&);
constexpr Convert kPack[] = {
    pack<kQ4_0>, pack<kQ4_1>, pack<kQ5_0>, pack<kQ5_1>,   pack<kQ8_0>,  pack<kQ3_K>,
    pack<kQ4_K>, pack<kQ5_K>, pack<kQ6_K>, pack<kIQ4_NL>, pack<kIQ4_XS>,
};
constexpr Convert kUnpack[] = {
    unpack<kQ4_0>, unpack<kQ4_1>, unpack<kQ5_0>, unpack<kQ5_1>,   unpack<kQ8_0>,  unpack<kQ3_K>,
    unpack<kQ4_K>, unpack<kQ5_K>, unpack<kQ6_K>, unpack<kIQ4_NL>, unpack<kIQ4_XS>,
};

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
