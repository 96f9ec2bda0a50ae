// Codes to and from the bit string of zaya_quant/pack.py: u = q + 2^(bits-1), element i of a row
// at the bits i*bits .. i*bits + bits - 1 of a little-endian string of 32-bit words.
#include <cstdint>
#include <cstring>

#include "zaya_quant.h"

namespace {

int64_t words_per_row(int64_t columns, int32_t bits) { return (columns * bits + 31) / 32; }

// Eight 4-bit codes, one per byte, to one word: each step halves the gaps between the fields.
inline uint32_t pack_nibbles(uint64_t bytes) {
    bytes = (bytes & 0x0F0F0F0F0F0F0F0Full) ^ 0x0808080808080808ull;
    bytes = (bytes | bytes >> 4) & 0x00FF00FF00FF00FFull;
    bytes = (bytes | bytes >> 8) & 0x0000FFFF0000FFFFull;
    return static_cast<uint32_t>(bytes | bytes >> 16);
}

inline uint64_t unpack_nibbles(uint32_t word) {
    uint64_t bytes = word;
    bytes = (bytes | bytes << 16) & 0x0000FFFF0000FFFFull;
    bytes = (bytes | bytes << 8) & 0x00FF00FF00FF00FFull;
    bytes = (bytes | bytes << 4) & 0x0F0F0F0F0F0F0F0Full;
    // u - 8 in two's complement: where bit 3 of u is clear, fill the high nibble with ones.
    const uint64_t clear = ~bytes & 0x0808080808080808ull;
    return (bytes ^ 0x0808080808080808ull) | (clear << 1 | clear << 2 | clear << 3 | clear << 4);
}

// The columns from `from` on, one at a time; `from * bits` must be a multiple of 32.
void pack_tail(const int8_t* codes, uint32_t* words, int64_t from, int64_t columns, int32_t bits) {
    const uint32_t mask = (1u << bits) - 1, half = 1u << (bits - 1);
    uint64_t buffer = 0;
    int32_t filled = 0;
    words += from * bits / 32;
    for (int64_t i = from; i < columns; i++) {
        const uint64_t field = (static_cast<uint32_t>(codes[i]) + half) & mask;
        buffer |= field << filled;
        filled += bits;
        if (filled >= 32) {
            *words++ = static_cast<uint32_t>(buffer);
            buffer >>= 32;
            filled -= 32;
        }
    }
    if (filled > 0) *words = static_cast<uint32_t>(buffer);
}

void unpack_tail(const uint32_t* words, int8_t* codes, int64_t from, int64_t columns,
                 int32_t bits) {
    const uint32_t mask = (1u << bits) - 1, half = 1u << (bits - 1);
    uint64_t buffer = 0;
    int32_t filled = 0;
    words += from * bits / 32;
    for (int64_t i = from; i < columns; i++) {
        if (filled < bits) {
            buffer |= static_cast<uint64_t>(*words++) << filled;
            filled += 32;
        }
        codes[i] = static_cast<int8_t>((static_cast<uint32_t>(buffer) & mask) - half);
        buffer >>= bits;
        filled -= bits;
    }
}

}  // namespace

// Returns -1, or the flat index of the first code outside the range of `bits`.
ZQ_EXPORT int64_t zq_pack(const int8_t* codes, uint32_t* words, int64_t rows, int64_t columns,
                          int32_t bits) {
    const int32_t low = -(1 << (bits - 1)), high = (1 << (bits - 1)) - 1;
    for (int64_t row = 0; row < rows; row++) {
        const int8_t* source = codes + row * columns;
        uint32_t* target = words + row * words_per_row(columns, bits);
        int8_t smallest = 0, largest = 0;
        for (int64_t i = 0; i < columns; i++) {
            smallest = source[i] < smallest ? source[i] : smallest;
            largest = source[i] > largest ? source[i] : largest;
        }
        if (smallest < low || largest > high) {
            int64_t i = 0;
            while (source[i] >= low && source[i] <= high) i++;
            return row * columns + i;
        }
        int64_t done = 0;
        if (bits == 4) {
            for (done = 0; done + 8 <= columns; done += 8) {
                uint64_t bytes;
                std::memcpy(&bytes, source + done, 8);
                target[done / 8] = pack_nibbles(bytes);
            }
        } else if (bits == 8) {
            for (done = 0; done + 4 <= columns; done += 4) {
                uint32_t bytes;
                std::memcpy(&bytes, source + done, 4);
                target[done / 4] = bytes ^ 0x80808080u;
            }
        }
        pack_tail(source, target, done, columns, bits);
    }
    return -1;
}

ZQ_EXPORT void zq_unpack(const uint32_t* words, int8_t* codes, int64_t rows, int64_t columns,
                         int32_t bits) {
    for (int64_t row = 0; row < rows; row++) {
        const uint32_t* source = words + row * words_per_row(columns, bits);
        int8_t* target = codes + row * columns;
        int64_t done = 0;
        if (bits == 4) {
            for (done = 0; done + 8 <= columns; done += 8) {
                const uint64_t bytes = unpack_nibbles(source[done / 8]);
                std::memcpy(target + done, &bytes, 8);
            }
        } else if (bits == 8) {
            for (done = 0; done + 4 <= columns; done += 4) {
                const uint32_t bytes = source[done / 4] ^ 0x80808080u;
                std::memcpy(target + done, &bytes, 4);
            }
        }
        unpack_tail(source, target, done, columns, bits);
    }
}
