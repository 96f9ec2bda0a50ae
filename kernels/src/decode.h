// One token of each sequence of a batch through the whole model: the C interface of zk_decode, and
// what decode_kernel.cpp computes for it, once per instruction set.
//
// Formulas and names of what a layer does are those of zaya_convert/runtime.  Everything between two
// matrices is fp32.  Vectors are fp32.  A Matrix may also be one that is not packed: with 16 bits
// rows of bf16, with 32 bits rows of fp32, one row after the other.
#pragma once

#include <cstdint>

#include "isa.h"
#include "zaya_kernels.h"

namespace zk {

struct Linear {
    Matrix matrix;
    const float* bias;  // [rows], or null
};

// x = (x + residual_bias) * residual_scale + (update + hidden_bias) * hidden_scale
struct Residual {
    const float* hidden_bias;
    const float* hidden_scale;
    const float* residual_bias;
    const float* residual_scale;
};

struct Expert {
    Matrix gate, up, down;
};

// c: query and key channels; R: width of the router; E: experts.
struct Layer {
    const float* input_norm;
    Linear query, key, current, delayed, output;
    const float* depthwise;       // [c, taps0]
    const float* depthwise_bias;  // [c]
    Matrix grouped;               // [c, head_dim * taps1], not packed
    const float* grouped_bias;    // [c]
    const float* temperature;     // [kv_heads]
    int64_t rotation;             // which of the model's frequencies
    Residual after_attention;
    const float* expert_norm;
    Linear router_down;
    const float* router_scale;  // [R], null in the first layer
    const float* router_norm;
    Linear router_first, router_second, router_last;
    const float* balancing;  // [E + 1]
    Residual after_experts;
    const Expert* experts;  // [E]
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, rotary_dim, taps0, taps1;
    int64_t experts, expert_width, router_width, rotations;
    const Layer* layer;
    const float* const* frequencies;  // [rotations][rotary_dim / 2]
    const float* norm;
    Linear head;
    float eps;       // of norms
    float shortest;  // heads are scaled up from no shorter length
    int32_t state_type;  // of states: kFloat32 or kBFloat16
    int32_t reserved;
};

// What a layer keeps of the batch, in the model's state_type.
struct State {
    void* keys_values;  // [2, batch, kv_heads, capacity, head_dim]
    int64_t capacity;
    int64_t start;  // columns [start, end) are of earlier tokens; there is room for one more
    int64_t end;
    void* columns;  // [batch, c, taps0 + taps1 - 2]
    void* delayed;  // [batch, kv_heads * head_dim / 2]
};

struct Step {
    int64_t batch;
    int64_t past;          // tokens before this one
    const uint8_t* valid;  // [batch, past + 1], 0 for padding; null: none is
};

// A stretch of keys and values of one kv head, as its query heads see it.
struct Stretch {
    const void* keys;    // [count, head_dim]
    const void* values;  // [count, head_dim]
    const uint8_t* visible;  // [count], or null: all
    int64_t count;           // at most kStretch
};

constexpr int64_t kStretch = 256;

// What decode_kernel.cpp defines.
//   rms_norm: weight * x / sqrt(mean(x^2) + eps) of n numbers.
//   dense: what `multiply` of isa.h is for packed matrices: rows [first, first + count) of x, `stride`
//     apart, by some tiles of 16 rows: out [tiles, count, 16].
//   make_head: the query (group < heads) or key [head_dim] of one head of a sequence, ready for
//     attention.  raw [c]: this token's column; columns: the state, advanced; angles: cosines and
//     sines [2, rotary_dim / 2]; room [head_dim * taps1].
//   attend: of `heads` queries one after the other, over a stretch: [heads, head_dim + 2], the
//     weighted sum of values, the sum of weights and the largest score; `step` numbers apart.
//   gelu: in place, 16 numbers, the form with erf.
//   residual: columns [first, first + n) of x, whose update is times `share`.
//   store: n numbers as the model's states have them.
#define ZK_DECODE_KERNELS(name)                                                                    \
    namespace name {                                                                               \
    void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out);          \
    void dense(const Matrix& matrix, int64_t tile, int64_t tiles, const float* x, int64_t stride,  \
               int64_t count, float* out);                                                         \
    void make_head(const Model& model, const Layer& layer, int64_t group, const float* raw,        \
                   void* columns, const float* angles, float* room, float* out);                   \
    void attend(const Model& model, const Stretch& stretch, const float* queries, int64_t heads,   \
                int64_t step, float* out);                                                         \
    void gelu(float* x);                                                                           \
    void residual(float* x, const float* update, float share, const Residual& with, int64_t first, \
                  int64_t n);                                                                      \
    void store(const float* from, int64_t n, int32_t type, void* to);                              \
    }
ZK_DECODE_KERNELS(base)
#if defined(ZK_X86_KERNELS)
ZK_DECODE_KERNELS(avx2)
ZK_DECODE_KERNELS(avx512)
#endif
#undef ZK_DECODE_KERNELS

struct DecodeKernels {
    decltype(&base::rms_norm) rms_norm;
    decltype(&base::dense) dense;
    decltype(&base::make_head) make_head;
    decltype(&base::attend) attend;
    decltype(&base::gelu) gelu;
    decltype(&base::residual) residual;
    decltype(&base::store) store;
};

#define ZK_CHOSEN(name)                                                                   \
    DecodeKernels {                                                                       \
        name::rms_norm, name::dense, name::make_head, name::attend, name::gelu,           \
            name::residual, name::store                                                   \
    }
inline DecodeKernels decode_kernels_of(int32_t isa) {
#if defined(ZK_X86_KERNELS)
    if (isa == kAvx512) return ZK_CHOSEN(avx512);
    if (isa == kAvx2) return ZK_CHOSEN(avx2);
#endif
    (void)isa;
    return ZK_CHOSEN(base);
}
#undef ZK_CHOSEN

}  // namespace zk
