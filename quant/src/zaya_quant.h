// C ABI of libzaya_quant: what zaya_quant/native.py calls through ctypes.
//
// Every function works on whole rows of one matrix, keeps no state and starts no thread; callers
// that want threads give each a range of rows.  Matrices are row-major without gaps.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define ZQ_EXPORT extern "C" __declspec(dllexport)
#else
#define ZQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace zq {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Isa : int32_t { kBase = 0, kAvx2 = 1, kAvx512 = 2 };
enum Status : int32_t {
    kOk = 0, kNonFinite = 1, kNotRepresentable = 2, kNoMemory = 3, kNoSuchType = 4
};
// In the order of BLOCK_TYPES of zaya_quant/spec.py.
enum BlockType : int32_t {
    kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kIQ4_NL, kIQ4_XS
};

// Symmetric quantization of rows of groups; see zaya_quant/affine.py for the arithmetic.
struct Request {
    const void* weight;       // [rows, columns] of `dtype`
    const float* importance;  // [columns], or null
    const float* ratios;      // candidate scales / absmax, in order of preference
    int8_t* codes;            // [rows, columns]
    void* scales;             // [rows, groups] of `scale_dtype`
    int64_t rows;
    int64_t columns;
    int64_t group_length;
    int32_t dtype;
    int32_t scale_dtype;
    int32_t bits;
    int32_t ratio_count;
    int32_t both_signs;
    int32_t refinements;
};

// Quantization of rows of ggml blocks: the tensors of zaya_quant.qtensor.BlockTensor, or codes and
// scales of a QuantTensor.  See zaya_quant/block_search.py and, for plain rounding, which looks at
// nothing from `importance` to `reach`, zaya_quant/blocks.py.
struct BlockRequest {
    const void* weight;           // [rows, columns] of `dtype`
    uint8_t* codes;               // [rows, columns], two's complement where they are signed
    uint16_t* scales;             // [rows, blocks] fp16
    uint16_t* offsets;            // [rows, blocks] fp16, or null where the type has none
    uint8_t* sub_scales;          // [rows, sub-groups], or null
    uint8_t* sub_mins;            // [rows, sub-groups], or null
    const float* importance;      // [columns], or null
    const float* ratios;          // the lists of block_search.Search
    const float* scale_ratios;
    const float* minimum_ratios;
    const int32_t* reach;
    int64_t rows;
    int64_t columns;              // whole blocks
    int32_t dtype;
    int32_t type;
    int32_t ratio_count;
    int32_t scale_count;
    int32_t minimum_count;
    int32_t turn_count;           // entries of `reach`
};

// A matrix of ggml blocks as bytes and as separate tensors; names as in BlockRequest.
struct Blocks {
    uint8_t* bytes;
    uint8_t* codes;
    uint16_t* scales;
    uint16_t* offsets;
    uint8_t* sub_scales;
    uint8_t* sub_mins;
    int64_t count;                // of all rows
    int32_t type;
};

// Where the first fault is: the flat index of a non-finite weight, or of a group (block) without a
// scale.
struct Result {
    int32_t status;
    int64_t index;
};

}  // namespace zq
