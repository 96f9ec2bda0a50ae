// C ABI of libzaya_kernels: what zaya_kernels/native.py calls through ctypes.
//
// Float matrices are row-major without gaps.  A packed matrix is laid out as layout.h says, and
// whoever packs it must keep it as it is.  Calls may come from several threads at once.
#pragma once

#include <cstdint>

#define ZK_EXPORT extern "C" __attribute__((visibility("default")))

namespace zk {

enum ScaleType : int32_t {
    kFloat32 = 0,
    kBFloat16 = 1,
    kFloat16 = 2,
    kProduct = 3,  // of an int8 for each group and a float16 for each 128 columns
};

// What a stored code u stands for.
enum Form : int32_t {
    kSymmetric = 0,   // (u - 2^(bits - 1)) * scale
    kZeroPoints = 1,  // (u - zero) * scale, zero a uint8 for each group
    kMinima = 2,      // u * scale + minimum, a number like the scale; with 8 bits u - 128
    kLevels = 3,      // level u of ggml's IQ4_NL * scale
};
enum Isa : int32_t { kBase = 0, kAvx2 = 1, kAvx512 = 2, kDotProduct = 1 };  // the last one on ARM
enum Status : int32_t { kOk = 0, kNoMemory = 1 };

// A quantized matrix [rows, columns].
struct Matrix {
    uint8_t* data;  // packed, aligned to 64 bytes
    int64_t rows;
    int64_t columns;
    int32_t bits;        // 4 or 8
    int32_t group;       // 16, 32, 64 or 128 columns share a scale
    int32_t scale_type;  // ScaleType
    int32_t form;        // Form
};

// What a matrix is packed from, row-major.
struct Source {
    const uint8_t* codes;  // [rows, columns]; u is the sum with `bias`, without carry
    const void* scales;    // [rows, groups], numbers of the scale type; int8 for kProduct
    const void* offsets;   // [rows, groups], uint8 zeros, to which `bias` is added too, or minima
    const uint16_t* outer_scales;   // for kProduct: float16 [rows, outer groups]
    const uint16_t* outer_offsets;  // for kProduct with minima
    int64_t group;  // columns, a multiple of the matrix's group or all of them
    int64_t outer;  // columns, a multiple of 128
    int32_t bias;
    int32_t reserved;
};

// How a call is to be computed.
struct Options {
    int32_t fast;     // activations rounded to int8, 32 of them sharing a scale; else to 24 bits
    int32_t isa;      // must not exceed zk_best_isa()
    int32_t threads;  // at least 1
    int32_t reserved;
};

// Memory that zk_read reads, in lines of 64 bytes.
struct Region {
    const void* data;
    int64_t bytes;
};

// One expert and the rows it receives: order[begin .. end).
struct Run {
    const Matrix* gate;  // [hidden, width]
    const Matrix* up;    // [hidden, width]
    const Matrix* down;  // [width, hidden]
    int64_t begin;
    int64_t end;
};

}  // namespace zk
