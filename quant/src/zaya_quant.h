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
enum Status : int32_t { kOk = 0, kNonFinite = 1, kNotRepresentable = 2, kNoMemory = 3 };

// Symmetric quantization of rows of groups; see zaya_quant/affine.py for the arithmetic.
struct Request {
    const void* weight;       // [rows, columns] of `dtype`
    const float* importance;  // [columns], or null
    const float* ratios;      // candidate scales / absmax, in order of preference
    int8_t* codes;            // [rows, columns]
    void* scales;             // [rows, groups] of `scale_dtype`
    double* signal;           // [rows]: sum of w^2
    double* noise;            // [rows]: sum of (w - code * scale)^2
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

// Where the first fault is: the flat index of a non-finite weight, or of a group without a scale.
struct Result {
    int32_t status;
    int64_t index;
};

}  // namespace zq
