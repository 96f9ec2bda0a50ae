// What a decode step computes between its quantized products.  Compiled once per instruction set.
//
// As in tile_kernel.cpp, the operations on a row and their order do not depend on the rows beside it.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "layout.h"
#include "vectors.h"

namespace zk {
namespace ZK_ISA_NAMESPACE {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// ---- numbers as they are stored ------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};

ZK_INLINE V widen(const float* from) { return load<V>(from); }
ZK_INLINE V widen(const BFloat16* from) { return widen_bfloat16(from); }
ZK_INLINE float value_of(float x) { return x; }
ZK_INLINE float value_of(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    return load<float>(&bits);
}
ZK_INLINE void put(float x, float* to) { *to = x; }
ZK_INLINE void put(float x, BFloat16* to) {
    uint32_t bits = load<uint32_t>(&x);
    if (x != x) bits |= 0x400000u;  // a NaN stays one
    else bits += 0x7FFFu + (bits >> 16 & 1u);
    to->bits = static_cast<uint16_t>(bits >> 16);
}

// ---- rows of floats ------------------------------------------------------------------------------

constexpr int kSums = W == 16 ? 4 : 2;  // of a row at a time: additions take longer than loads
constexpr int64_t kAhead = 2048;        // bytes that are asked for before they are needed

// out[r * step] = weights . x row r, for R rows `stride` apart.
template <typename T, int R>
ZK_INLINE void dots(const T* weights, int64_t columns, const float* x, int64_t stride, float* out,
                    int64_t step) {
    V sum[kSums][R] = {};
    int64_t i = 0;
    for (; i + kSums * W <= columns; i += kSums * W) {
        const char* ahead = reinterpret_cast<const char*>(weights + i) + kAhead;
        for (int64_t line = 0; line < kSums * W * static_cast<int64_t>(sizeof(T)); line += 64)
            __builtin_prefetch(ahead + line);
#pragma GCC unroll 4
        for (int s = 0; s < kSums; s++) {
            const V weight = widen(weights + i + s * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[s][r] += weight * load<V>(x + r * stride + i + s * W);
        }
    }
    for (; i + W <= columns; i += W) {
        const V weight = widen(weights + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[0][r] += weight * load<V>(x + r * stride + i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        V all = sum[0][r];
#pragma GCC unroll 4
        for (int s = 1; s < kSums; s++) all += sum[s][r];
        float total = sum_of(all);
        for (int64_t j = i; j < columns; j++) total += value_of(weights[j]) * x[r * stride + j];
        out[r * step] = total;
    }
}

// `rows` of weights by `count` rows of x: out[i * step + row].
template <typename T>
void rows_by(const T* weights, int64_t rows, int64_t columns, const float* x, int64_t stride,
             int64_t count, float* out, int64_t step) {
    for (int64_t row = 0; row < rows; row++, weights += columns, out++) {
        int64_t i = 0;
        for (; i + 4 <= count; i += 4)
            dots<T, 4>(weights, columns, x + i * stride, stride, out + i * step, step);
        for (; i < count; i++)
            dots<T, 1>(weights, columns, x + i * stride, stride, out + i * step, step);
    }
}

void rows_of(const Matrix& m, int64_t first, int64_t rows, const float* x, int64_t stride,
             int64_t count, float* out, int64_t step) {
    if (m.bits == 16)
        rows_by(reinterpret_cast<const BFloat16*>(m.data) + first * m.columns, rows, m.columns, x,
                stride, count, out, step);
    else
        rows_by(reinterpret_cast<const float*>(m.data) + first * m.columns, rows, m.columns, x,
                stride, count, out, step);
}

float dot(const float* a, const float* b, int64_t n) {
    float out;
    dots<float, 1>(a, n, b, 0, &out, 0);
    return out;
}

// erf x to 1.5e-7: formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions.
ZK_INLINE V error_function(V x) {
    const V size = from_bits((U)x & 0x7FFFFFFFu);
    const V t = 1.0f / (1.0f + 0.3275911f * size);
    V p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const V value = 1.0f - p * t * exponential(-size * size);
    return from_bits((U)value | ((U)x & 0x80000000u));
}

// ---- heads ---------------------------------------------------------------------------------------

// Both causal convolutions of a head's channels [head_dim]; the oldest column leaves the state.
template <typename T>
void convolve(const Model& m, const Layer& layer, int64_t first, const float* raw, T* columns,
              float* room, float* out) {
    const int64_t kept = m.taps0 + m.taps1 - 2;
    for (int64_t i = 0; i < m.head_dim; i++) {
        const int64_t channel = first + i;
        T* own = columns + channel * kept;
        for (int64_t s = 0; s < m.taps1; s++) {
            float sum = layer.depthwise_bias[channel];
            for (int64_t t = 0; t < m.taps0; t++)
                sum += layer.depthwise[channel * m.taps0 + t] *
                       (s + t < kept ? value_of(own[s + t]) : raw[channel]);
            room[i * m.taps1 + s] = sum;
        }
        for (int64_t s = 0; s + 1 < kept; s++) own[s] = own[s + 1];
        if (kept > 0) put(raw[channel], own + kept - 1);
    }
    rows_of(layer.grouped, first, m.head_dim, room, 0, 1, out, 0);
    for (int64_t i = 0; i < m.head_dim; i++) out[i] += layer.grouped_bias[first + i];
}

// R queries over a stretch; see decode.h.
template <typename T, int R>
void attend_some(int64_t dim, const Stretch& stretch, const float* queries, int64_t step,
                 float* out) {
    const T* keys = static_cast<const T*>(stretch.keys);
    const T* values = static_cast<const T*>(stretch.values);
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const int64_t count = stretch.count, whole = dim / W * W;
    alignas(64) float weights[R][kStretch];
    float most[R], total[R];
    for (int r = 0; r < R; r++) most[r] = kMinusInfinity;
    for (int64_t j = 0; j < count; j++) {
        if (stretch.visible != nullptr && stretch.visible[j] == 0) {
            for (int r = 0; r < R; r++) weights[r][j] = kMinusInfinity;
            continue;
        }
        float scores[R];
        dots<T, R>(keys + j * dim, dim, queries, dim, scores, 1);
        for (int r = 0; r < R; r++) {
            weights[r][j] = scores[r] * scale;
            most[r] = weights[r][j] > most[r] ? weights[r][j] : most[r];
        }
    }
    for (int r = 0; r < R; r++) {
        for (int64_t j = count; j % W != 0; j++) weights[r][j] = kMinusInfinity;
        // Where nothing is seen every weight must come out 0, not NaN.
        const float top = most[r] == kMinusInfinity ? 0.0f : most[r];
        V sum{};
        for (int64_t j = 0; j < count; j += W) {
            const V x = load<V>(weights[r] + j) - top;
            V weight = exponential(x);
            weight = x < splat(-87.0f) ? V{} : weight;
            weight = x == x ? weight : x;  // a NaN stays one
            sum += weight;
            std::memcpy(weights[r] + j, &weight, sizeof weight);
        }
        total[r] = sum_of(sum);
    }
    constexpr int kColumns = 4;  // vectors of a value at a time
    int64_t i = 0;
    const auto take = [&](auto columns) {
        constexpr int C = decltype(columns)::value;
        V sum[R][C] = {};
        for (int64_t j = 0; j < count; j++) {
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const V value = widen(values + j * dim + i + c * W);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[r][c] += weights[r][j] * value;
            }
        }
        for (int r = 0; r < R; r++) std::memcpy(out + r * step + i, sum[r], sizeof sum[r]);
        i += C * W;
    };
    while (i + kColumns * W <= whole) take(std::integral_constant<int, kColumns>{});
    while (i < whole) take(std::integral_constant<int, 1>{});
    for (; i < dim; i++) {
        for (int r = 0; r < R; r++) {
            float sum = 0;
            for (int64_t j = 0; j < count; j++) sum += weights[r][j] * value_of(values[j * dim + i]);
            out[r * step + i] = sum;
        }
    }
    for (int r = 0; r < R; r++) {
        out[r * step + dim] = total[r];
        out[r * step + dim + 1] = most[r];
    }
}

template <typename T>
void attend_all(int64_t dim, const Stretch& stretch, const float* queries, int64_t heads,
                int64_t step, float* out) {
    int64_t head = 0;
    for (; head + 4 <= heads; head += 4)
        attend_some<T, 4>(dim, stretch, queries + head * dim, step, out + head * step);
    for (; head < heads; head++)
        attend_some<T, 1>(dim, stretch, queries + head * dim, step, out + head * step);
}

}  // namespace

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    const float factor = 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * factor);
}

void dense(const Matrix& matrix, int64_t tile, int64_t tiles, const float* x, int64_t stride,
           int64_t count, float* out) {
    for (int64_t t = 0; t < tiles; t++, out += count * kTile) {
        const int64_t first = (tile + t) * kTile;
        rows_of(matrix, first, std::min<int64_t>(kTile, matrix.rows - first), x, stride, count, out,
                kTile);
    }
}

void make_head(const Model& m, const Layer& layer, int64_t group, const float* raw, void* columns,
               const float* angles, float* room, float* out) {
    const int64_t dim = m.head_dim, first = group * dim, shared = m.heads / m.kv_heads;
    if (m.state_type == kBFloat16)
        convolve(m, layer, first, raw, static_cast<BFloat16*>(columns), room, out);
    else
        convolve(m, layer, first, raw, static_cast<float*>(columns), room, out);
    const bool is_key = group >= m.heads;
    const int64_t kv = is_key ? group - m.heads : group / shared;
    const float* key = raw + (m.heads + kv) * dim;
    if (is_key) {
        for (int64_t i = 0; i < dim; i++) {
            float sum = 0;
            for (int64_t r = 0; r < shared; r++) sum += (raw[(kv * shared + r) * dim + i] + key[i]) * 0.5f;
            out[i] += sum / static_cast<float>(shared);
        }
    } else {
        for (int64_t i = 0; i < dim; i++) out[i] += (raw[first + i] + key[i]) * 0.5f;
    }
    const float length = std::sqrt(dot(out, out, dim));
    float factor = std::sqrt(static_cast<float>(dim)) / std::max(length, m.shortest);
    if (is_key) factor *= layer.temperature[kv];
    for (int64_t i = 0; i < dim; i++) out[i] *= factor;
    const int64_t half = m.rotary_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = out[i], b = out[half + i], cosine = angles[i], sine = angles[half + i];
        out[i] = a * cosine - b * sine;
        out[half + i] = b * cosine + a * sine;
    }
}

void attend(const Model& model, const Stretch& stretch, const float* queries, int64_t heads,
            int64_t step, float* out) {
    if (model.state_type == kBFloat16)
        attend_all<BFloat16>(model.head_dim, stretch, queries, heads, step, out);
    else
        attend_all<float>(model.head_dim, stretch, queries, heads, step, out);
}

void gelu(float* x) {
    for (int64_t i = 0; i < kTile; i += W) {
        const V value = load<V>(x + i);
        const V result = 0.5f * value * (1.0f + error_function(value * 0.70710678f));
        std::memcpy(x + i, &result, sizeof result);
    }
}

void residual(float* x, const float* update, float share, const Residual& with, int64_t first,
              int64_t n) {
    for (int64_t i = 0, at = first; i < n; i++, at++)
        x[at] = (update[i] * share + with.hidden_bias[at]) * with.hidden_scale[at] +
                (x[at] + with.residual_bias[at]) * with.residual_scale[at];
}

void store(const float* from, int64_t n, int32_t type, void* to) {
    for (int64_t i = 0; i < n; i++) {
        if (type == kBFloat16) put(from[i], static_cast<BFloat16*>(to) + i);
        else put(from[i], static_cast<float*>(to) + i);
    }
}

}  // namespace ZK_ISA_NAMESPACE
}  // namespace zk
