// Entry points, and the choice of an instruction set at run time.
#include <cstdint>

#include "isa.h"
#include "zaya_quant.h"

namespace zq {

static int32_t best_isa() {
#if defined(ZQ_X86_KERNELS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
    return kBase;
}

// Bit patterns of floats without their sign are ordered like the floats, NaN and infinity on top.
template <typename Bits>
static int64_t absmax_span(const Bits* weight, Bits mask, Bits infinity, int64_t rows,
                           int64_t columns, int64_t group_length, Bits* span) {
    Bits smallest = infinity, largest = 0;
    for (int64_t row = 0; row < rows; row++) {
        const Bits* values = weight + row * columns;
        for (int64_t start = 0; start < columns; start += group_length) {
            const int64_t left = columns - start;
            const int64_t end = start + (left < group_length ? left : group_length);
            Bits absmax = 0;
            for (int64_t i = start; i < end; i++) {
                const Bits size = values[i] & mask;
                absmax = size > absmax ? size : absmax;
            }
            if (absmax >= infinity) {
                int64_t i = start;
                while ((values[i] & mask) < infinity) i++;
                return row * columns + i;
            }
            if (absmax != 0 && absmax < smallest) smallest = absmax;
            largest = absmax > largest ? absmax : largest;
        }
    }
    span[0] = largest == 0 ? 0 : smallest;
    span[1] = largest;
    return -1;
}

}  // namespace zq

// Raised with every change of a signature or a struct; native.py refuses another number.
ZQ_EXPORT int32_t zq_abi_version() { return 4; }

ZQ_EXPORT int32_t zq_best_isa() { return zq::best_isa(); }

// `isa` must not exceed zq_best_isa(); all give the same bits.
ZQ_EXPORT int32_t zq_quantize(const zq::Request* request, int32_t isa, int64_t* index) {
    const zq::Result result = ZQ_DISPATCH(isa, quantize, *request);
    *index = result.index;
    return result.status;
}

// span: the bit patterns of the smallest nonzero and the largest absmax of the groups.  Returns
// -1, or the flat index of the first non-finite weight.
ZQ_EXPORT int64_t zq_absmax_span(const void* weight, int32_t dtype, int64_t rows, int64_t columns,
                                 int64_t group_length, uint32_t* span) {
    if (dtype == zq::kFloat32) {
        int32_t bits[2] = {0, 0};
        const int64_t bad =
            zq::absmax_span<int32_t>(static_cast<const int32_t*>(weight), 0x7FFFFFFF, 0x7F800000,
                                     rows, columns, group_length, bits);
        span[0] = bits[0];
        span[1] = bits[1];
        return bad;
    }
    int16_t bits[2] = {0, 0};
    const int16_t infinity = dtype == zq::kBFloat16 ? 0x7F80 : 0x7C00;
    const int64_t bad = zq::absmax_span<int16_t>(static_cast<const int16_t*>(weight), 0x7FFF,
                                                 infinity, rows, columns, group_length, bits);
    span[0] = bits[0];
    span[1] = bits[1];
    return bad;
}
