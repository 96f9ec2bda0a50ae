// C ABI of libzaya_kernels: what zaya_kernels/native.py calls through ctypes.
//
// Float matrices are row-major without gaps.  A packed matrix is laid out as layout.h says, and
// whoever packs it must keep it as it is.  Calls may come from several threads at once.
#pragma once

#include <cstdint>

#define ZK_EXPORT extern "C" __attribute__((visibility("default")))

namespace zk {

enum ScaleType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Isa : int32_t { kBase = 0, kAvx2 = 1, kAvx512 = 2 };
enum Status : int32_t { kOk = 0, kNoMemory = 1 };

// A quantized matrix [rows, columns], symmetric: value = code * scale of its group.
struct Matrix {
    uint8_t* data;  // packed, aligned to 64 bytes
    int64_t rows;
    int64_t columns;
    int32_t bits;        // 4 or 8
    int32_t group;       // 32, 64 or 128 columns share a scale
    int32_t scale_type;  // ScaleType
    int32_t reserved;
};

// How a call is to be computed.
struct Options {
    int32_t fast;     // activations rounded to int8, 32 of them sharing a scale; else fp32 sums
    int32_t isa;      // must not exceed zk_best_isa()
    int32_t threads;  // at least 1
    int32_t reserved;
};

// One expert and the rows it receives: order[begin .. end).
struct Run {
    Matrix gate;  // [hidden, width]
    Matrix up;    // [hidden, width]
    Matrix down;  // [width, hidden]
    int64_t begin;
    int64_t end;
};

}  // namespace zk
