// The choice of an instruction set at run time.
#pragma once

#include <cstdint>

#include "zaya_quant.h"

namespace zq {

// What kernel files define, once per instruction set.
#define ZQ_KERNELS(name)                               \
    namespace name {                                   \
    Result quantize(const Request& request);           \
    Result search_blocks(const BlockRequest& request); \
    Result plain_blocks(const BlockRequest& request);  \
    }
ZQ_KERNELS(base)
#if defined(ZQ_X86_KERNELS)
ZQ_KERNELS(avx2)
ZQ_KERNELS(avx512)
// Calls `function` in the copy for `isa`, which must not exceed best_isa().
#define ZQ_DISPATCH(isa, function, request)                       \
    ((isa) == zq::kAvx512 ? zq::avx512::function(request)         \
     : (isa) == zq::kAvx2 ? zq::avx2::function(request)           \
                          : zq::base::function(request))
#else
#define ZQ_DISPATCH(isa, function, request) ((void)(isa), zq::base::function(request))
#endif
#undef ZQ_KERNELS

}  // namespace zq
