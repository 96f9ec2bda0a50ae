// zk_decode: the phases of a step, one Team for all of them.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "layout.h"
#include "ops.h"
#include "pool.h"

namespace zk {
namespace {

constexpr int32_t kPadding = -1;  // the route of a token that is none

bool packed(const Matrix& m) { return m.bits <= 8; }

// Memory taken piece by piece; without memory it counts what is needed.
class Arena {
public:
    explicit Arena(char* memory) : memory_(memory) {}

    template <typename T>
    T* take(int64_t count) {
        T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += aligned(count * static_cast<int64_t>(sizeof(T)));
        return piece;
    }
    int64_t used() const { return used_; }

private:
    char* memory_;
    int64_t used_ = 0;
};

// What a step keeps between its phases; rows are of sequences, except `inputs` and `inner`, whose
// rows are sorted by expert.
struct Room {
    float *h, *qk, *current, *delayed, *angles, *heads, *convolved, *partial, *mixed;
    float *state, *first, *second, *classes, *inputs, *inner;
    int64_t *order, *choice;
    char* prepared;  // rows of the matrices' inputs as packed ones read them
    float* share;
    bool* real;

    Room(Arena& arena, const Team& team, const Model& m, int64_t batch, int64_t stretches, bool fast) {
        const int64_t groups = m.heads + m.kv_heads, dim = m.head_dim;
        const int64_t widest = std::max({m.hidden, m.heads * dim, m.expert_width, m.router_width});
        h = arena.take<float>(batch * m.hidden);
        qk = arena.take<float>(batch * groups * dim);
        current = arena.take<float>(batch * m.kv_heads * dim);
        delayed = arena.take<float>(batch * m.kv_heads * dim);
        angles = arena.take<float>(m.rotations * batch * m.rotary_dim);
        heads = arena.take<float>(batch * groups * dim);
        convolved = arena.take<float>(batch * groups * dim * m.taps1);
        partial = arena.take<float>(batch * m.heads * stretches * (dim + 2));
        mixed = arena.take<float>(batch * m.heads * dim);
        state = arena.take<float>(batch * m.router_width);
        first = arena.take<float>(batch * m.router_width);
        second = arena.take<float>(batch * m.router_width);
        classes = arena.take<float>(batch * (m.experts + 1));
        inputs = arena.take<float>(batch * m.hidden);
        inner = arena.take<float>(batch * (m.expert_width + kTile));
        order = arena.take<int64_t>(batch);
        choice = arena.take<int64_t>(batch);
        prepared = arena.take<char>(inputs_bytes(team, batch, widest, fast));
        share = arena.take<float>(batch);
        real = arena.take<bool>(batch);
    }
};

// Rows of activations.
struct Activations {
    const float* values;
    int64_t stride;

    const float* operator()(int64_t i) const { return values + i * stride; }
};

// The same, and what packed matrices read instead.
struct Both {
    Activations floats;
    Rows rows;
};

struct Input {
    Activations floats;
    Inputs<Activations> prepared;

    // For one range after the other of a run.
    Both of(const Range& range) const { return {floats, prepared.of(range)}; }
};

// Rows of one expert: order[begin .. end).
struct Share {
    const Expert* expert;
    int64_t begin, end;
};

class Decoder {
public:
    Decoder(Team& team, const Model& model, State* states, const Step& step, const Options& options,
            const Room& room, int64_t stretches)
        : team_(team), m_(model), states_(states), step_(step), fast_(options.fast != 0),
          kernels_(kernels_of(options.isa)), own_(decode_kernels_of(options.isa)), room_(room),
          stretches_(stretches), batch_(step.batch) {}

    void run(float* x, float* logits, int32_t* routes, float* weights) {
        for (int64_t b = 0; b < batch_; b++) {
            const uint8_t* valid = step_.valid ? step_.valid + b * (step_.past + 1) : nullptr;
            room_.real[b] = valid == nullptr || valid[step_.past] != 0;
            int64_t position = step_.past;
            if (valid != nullptr) {
                position = -1;
                for (int64_t i = 0; i <= step_.past; i++) position += valid[i] != 0;
            }
            rotate(b, static_cast<float>(std::max<int64_t>(position, 0)));
        }
        for (int64_t i = 0; i < m_.layers; i++) {
            attention(m_.layer[i], states_[i], x);
            experts(m_.layer[i], x, routes + i * batch_, weights + i * batch_);
        }
        for (int64_t b = 0; b < batch_; b++) norm(x, m_.norm, b);
        const Linear* head[] = {&m_.head};
        product(head, 1, input(head, 1, room_.h, m_.hidden), batch_,
                [&](int, int64_t row, int64_t first, int64_t lanes, const float* from) {
                    std::memcpy(logits + row * m_.head.matrix.rows + first, from, 4 * lanes);
                });
    }

private:
    void rotate(int64_t b, float position) {
        const int64_t half = m_.rotary_dim / 2;
        for (int64_t r = 0; r < m_.rotations; r++) {
            float* angles = room_.angles + (r * batch_ + b) * m_.rotary_dim;
            for (int64_t i = 0; i < half; i++) {
                const float angle = position * m_.frequencies[r][i];
                angles[i] = std::cos(angle);
                angles[half + i] = std::sin(angle);
            }
        }
    }

    void norm(const float* x, const float* weight, int64_t b) {
        own_.rms_norm(x + b * m_.hidden, weight, m_.hidden, m_.eps, room_.h + b * m_.hidden);
    }

    // ---- products --------------------------------------------------------------------------------

    // Rows of activations, prepared where one of the matrices is packed.
    Input input(const Matrix* const* matrices, int count, const float* values, int64_t stride,
                int64_t rows) {
        const bool any = std::any_of(matrices, matrices + count,
                                     [](const Matrix* m) { return packed(*m); });
        const Activations floats = {values, stride};
        return {floats, Inputs(team_, kernels_, fast_, room_.prepared, matrices[0]->columns,
                               any ? rows : 0, floats)};
    }

    Input input(const Linear* const* linears, int count, const float* values, int64_t stride) {
        const Matrix* matrices[4];
        for (int i = 0; i < count; i++) matrices[i] = &linears[i]->matrix;
        return input(matrices, count, values, stride, batch_);
    }

    // Some tiles by rows [first, first + count): out [tiles, count, 16].
    void multiply(const Matrix& m, int64_t tile, int64_t tiles, const Both& in, int64_t first,
                  int64_t count, float* out) const {
        if (packed(m)) kernels_.multiply(m, tile, tiles, fast_, in.rows, first, count, out);
        else own_.dense(m, tile, tiles, in.floats(first), in.floats.stride, count, out);
    }

    // emit(row, first, lanes, values) for the rows and columns of tiles [begin, end) of a product
    // with rows [from, to) of the input.
    template <typename Emit>
    void some_tiles(const Matrix& m, const float* bias, int64_t begin, int64_t end, const Both& in,
                    int64_t from, int64_t to, Emit emit) const {
        alignas(kLine) float part[kTogether * kRows * kTile];
        for (int64_t tile = begin; tile < end; tile += kTogether) {
            const int64_t taken = std::min<int64_t>(kTogether, end - tile);
            for (int64_t start = from; start < to; start += kRows) {
                const int64_t count = std::min(kRows, to - start);
                multiply(m, tile, taken, in, start, count, part);
                float* own = part;
                for (int64_t t = tile; t < tile + taken; t++) {
                    const int64_t first = t * kTile;
                    const int64_t lanes = std::min<int64_t>(kTile, m.rows - first);
                    for (int64_t i = 0; i < count; i++, own += kTile) {
                        if (bias != nullptr)
                            for (int64_t lane = 0; lane < lanes; lane++)
                                own[lane] += bias[first + lane];
                        emit(start + i, first, lanes, own);
                    }
                }
            }
        }
    }

    // emit(which, row, first, lanes, values) for products of the same input with several matrices.
    template <typename Emit>
    void product(const Linear* const* linears, int count, const Input& in, int64_t rows, Emit emit) {
        int64_t total = 0;
        for (int i = 0; i < count; i++) total += tiles(linears[i]->matrix);
        team_.run(total, kAnything, [&](const Range& range) {
            const Both both = in.of(range);
            int64_t before = 0;
            for (int i = 0; i < count; i++) {
                const Matrix& m = linears[i]->matrix;
                const int64_t from = std::max<int64_t>(range.begin - before, 0);
                const int64_t to = std::min(range.end - before, tiles(m));
                some_tiles(m, linears[i]->bias, from, to, both, 0, rows,
                           [&](int64_t row, int64_t first, int64_t lanes, float* own) {
                               emit(i, row, first, lanes, own);
                           });
                before += tiles(m);
            }
        });
    }

    // ---- attention -------------------------------------------------------------------------------

    void attention(const Layer& layer, State& state, float* x) {
        for (int64_t b = 0; b < batch_; b++) {
            norm(x, layer.input_norm, b);
            if (!room_.real[b]) std::memset(room_.h + b * m_.hidden, 0, 4 * m_.hidden);
        }
        const Linear* linears[] = {&layer.query, &layer.key, &layer.current, &layer.delayed};
        const int64_t queries = m_.heads * m_.head_dim, channels = queries + m_.kv_heads * m_.head_dim;
        const int64_t half = layer.delayed.matrix.rows;
        product(linears, 4, input(linears, 4, room_.h, m_.hidden), batch_,
                [&](int which, int64_t row, int64_t first, int64_t lanes, const float* from) {
                    float* to = which == 2   ? room_.current + row * half
                                : which == 3 ? room_.delayed + row * half
                                             : room_.qk + row * channels + (which ? queries : 0);
                    // A padded column is zero, as before the start, whatever the biases are.
                    if (which < 2 && !room_.real[row]) std::memset(to + first, 0, 4 * lanes);
                    else std::memcpy(to + first, from, 4 * lanes);
                });
        make_heads(layer, state);
        attend(state);
        const Linear* output[] = {&layer.output};
        product(output, 1, input(output, 1, room_.mixed, queries), batch_,
                [&](int, int64_t row, int64_t first, int64_t lanes, const float* from) {
                    own_.residual(x + row * m_.hidden, from, 1.0f, layer.after_attention, first, lanes);
                });
    }

    int64_t state_size() const { return m_.state_type == kBFloat16 ? 2 : 4; }

    // Keys (0) or values (1) of a kv head from a column on.
    char* place(const State& state, int64_t which, int64_t b, int64_t head, int64_t column) const {
        const int64_t rows = ((which * batch_ + b) * m_.kv_heads + head) * state.capacity + column;
        return static_cast<char*>(state.keys_values) + rows * m_.head_dim * state_size();
    }

    // Queries to `heads`; this token's key and value to the state.
    void make_heads(const Layer& layer, const State& state) {
        const int64_t groups = m_.heads + m_.kv_heads, dim = m_.head_dim, size = state_size();
        const int64_t half = layer.delayed.matrix.rows, kept = m_.taps0 + m_.taps1 - 2;
        for (int64_t b = 0; b < batch_; b++) {
            // The value: this token's half and the delayed half of the token before.
            char* before = static_cast<char*>(state.delayed) + b * half * size;
            std::vector<char>& value = value_;
            value.resize(2 * half * size);
            own_.store(room_.current + b * half, half, m_.state_type, value.data());
            std::memcpy(value.data() + half * size, before, half * size);
            own_.store(room_.delayed + b * half, half, m_.state_type, before);
            for (int64_t head = 0; head < m_.kv_heads; head++)
                std::memcpy(place(state, 1, b, head, state.end), value.data() + head * dim * size,
                            dim * size);
        }
        team_.run(batch_ * groups, kAnything, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t b = item / groups, group = item % groups;
                float* head = room_.heads + item * dim;
                own_.make_head(m_, layer, group, room_.qk + b * groups * dim,
                               static_cast<char*>(state.columns) + b * groups * dim * kept * size,
                               room_.angles + (layer.rotation * batch_ + b) * m_.rotary_dim,
                               room_.convolved + item * dim * m_.taps1, head);
                if (group >= m_.heads)
                    own_.store(head, dim, m_.state_type,
                               place(state, 0, b, group - m_.heads, state.end));
            }
        });
    }

    // Attention over the state's columns, in stretches that may run at once, to `mixed`.
    void attend(const State& state) {
        const int64_t count = state.end + 1 - state.start, dim = m_.head_dim, step = dim + 2;
        const int64_t stretches = ceil_div(count, kStretch), shared = m_.heads / m_.kv_heads;
        const auto partial = [&](int64_t b, int64_t head) {
            return room_.partial + (b * m_.heads + head) * stretches * step;
        };
        team_.run(batch_ * m_.kv_heads * stretches, kAnything, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t s = item % stretches, kv = item / stretches % m_.kv_heads;
                const int64_t b = item / stretches / m_.kv_heads, from = s * kStretch;
                const int64_t some = std::min(kStretch, count - from), column = state.start + from;
                uint8_t visible[kStretch];
                for (int64_t i = 0; i < some; i++) visible[i] = sees(b, count - from - i);
                const Stretch stretch = {place(state, 0, b, kv, column),
                                         place(state, 1, b, kv, column),
                                         step_.valid ? visible : nullptr, some};
                own_.attend(m_, stretch, room_.heads + (b * (m_.heads + m_.kv_heads) + kv * shared) * dim,
                            shared, stretches * step, partial(b, kv * shared) + s * step);
            }
        });
        for (int64_t b = 0; b < batch_; b++)
            for (int64_t head = 0; head < m_.heads; head++)
                join(partial(b, head), stretches, room_.mixed + (b * m_.heads + head) * dim);
    }

    // Whether a sequence's new token sees the column `back` columns from the end; 1 is its own.
    // Nothing sees padding, except that padding sees itself, so that no row is empty.
    bool sees(int64_t b, int64_t back) const {
        return step_.valid == nullptr || back == 1 ||
               step_.valid[(b + 1) * (step_.past + 1) - back] != 0;
    }

    // Softmax over all stretches from the sums within each.
    void join(const float* partial, int64_t stretches, float* out) const {
        const int64_t dim = m_.head_dim;
        float most = -std::numeric_limits<float>::infinity(), total = 0;
        for (int64_t s = 0; s < stretches; s++)
            most = std::max(most, partial[s * (dim + 2) + dim + 1]);
        std::memset(out, 0, 4 * dim);
        for (int64_t s = 0; s < stretches; s++, partial += dim + 2) {
            const float factor = stretches == 1 ? 1.0f : std::exp(partial[dim + 1] - most);
            total += factor * partial[dim];
            for (int64_t i = 0; i < dim; i++) out[i] += factor * partial[i];
        }
        for (int64_t i = 0; i < dim; i++) out[i] /= total;
    }

    // ---- experts ---------------------------------------------------------------------------------

    void experts(const Layer& layer, float* x, int32_t* routes, float* weights) {
        for (int64_t b = 0; b < batch_; b++) norm(x, layer.expert_norm, b);
        route(layer, routes, weights);
        const std::vector<Share>& shares = sort(layer, routes);
        for (int64_t b = 0; b < batch_; b++) {
            const float nothing[kTile] = {};
            if (room_.choice[b] >= 0) continue;
            for (int64_t i = 0; i < m_.hidden; i += kTile)
                own_.residual(x + b * m_.hidden, nothing, 0.0f, layer.after_experts, i,
                              std::min<int64_t>(kTile, m_.hidden - i));
        }
        if (shares.empty()) return;
        const int64_t rows = shares.back().end;
        const int64_t width = ceil_div(m_.expert_width, kTile) * kTile;
        for (int64_t i = 0; i < rows; i++)
            std::memcpy(room_.inputs + i * m_.hidden, room_.h + room_.order[i] * m_.hidden,
                        4 * m_.hidden);
        matrices_.clear();
        for (const Share& share : shares) {
            matrices_.push_back(&share.expert->gate);
            matrices_.push_back(&share.expert->up);
        }
        const Input in = input(matrices_.data(), static_cast<int>(matrices_.size()), room_.inputs,
                               m_.hidden, rows);
        each_share(shares, width / kTile, in,
                   [&](const Share& share, int64_t begin, int64_t end, const Both& both) {
                       gate_up(share, begin, end, both, width);
                   });
        matrices_.clear();
        for (const Share& share : shares) matrices_.push_back(&share.expert->down);
        const Input inner = input(matrices_.data(), static_cast<int>(matrices_.size()), room_.inner,
                                  width, rows);
        each_share(shares, ceil_div(m_.hidden, kTile), inner,
                   [&](const Share& share, int64_t begin, int64_t end, const Both& both) {
            some_tiles(share.expert->down, nullptr, begin, end, both, share.begin, share.end,
                       [&](int64_t i, int64_t first, int64_t lanes, const float* from) {
                           const int64_t row = room_.order[i];
                           own_.residual(x + row * m_.hidden, from, weights[row], layer.after_experts,
                                         first, lanes);
                       });
        });
    }

    // The router's choices and their probabilities; padding is routed nowhere.
    void route(const Layer& layer, int32_t* routes, float* weights) {
        const int64_t width = m_.router_width, classes = m_.experts + 1;
        const Linear* down[] = {&layer.router_down};
        product(down, 1, input(down, 1, room_.h, m_.hidden), batch_,
                [&](int, int64_t row, int64_t first, int64_t lanes, const float* from) {
                    float* state = room_.state + row * width + first;
                    const float* scale = layer.router_scale;
                    for (int64_t i = 0; i < lanes; i++)
                        state[i] = from[i] + (scale ? scale[first + i] * state[i] : 0.0f);
                });
        for (int64_t b = 0; b < batch_; b++)
            own_.rms_norm(room_.state + b * width, layer.router_norm, width, m_.eps,
                          room_.second + b * width);
        activated(layer.router_first, room_.second, room_.first);
        activated(layer.router_second, room_.first, room_.second);
        const Linear* last[] = {&layer.router_last};
        const Range all = {0, ceil_div(classes, kTile), 0, true};
        some_tiles(last[0]->matrix, last[0]->bias, all.begin, all.end,
                   input(last, 1, room_.second, width).of(all), 0, batch_,
                   [&](int64_t row, int64_t first, int64_t lanes, const float* from) {
                       std::memcpy(room_.classes + row * classes + first, from, 4 * lanes);
                   });
        for (int64_t b = 0; b < batch_; b++) {
            float* scores = room_.classes + b * classes;
            const float most = *std::max_element(scores, scores + classes);
            float total = 0;
            for (int64_t i = 0; i < classes; i++) total += scores[i] = std::exp(scores[i] - most);
            int64_t best = 0;
            for (int64_t i = 0; i < classes; i++) {
                scores[i] /= total;
                if (scores[i] + layer.balancing[i] > scores[best] + layer.balancing[best]) best = i;
            }
            routes[b] = room_.real[b] ? static_cast<int32_t>(best) : kPadding;
            weights[b] = scores[best];
        }
    }

    void activated(const Linear& linear, const float* from, float* to) {
        const int64_t width = m_.router_width;
        const Linear* linears[] = {&linear};
        product(linears, 1, input(linears, 1, from, width), batch_,
                [&](int, int64_t row, int64_t first, int64_t lanes, float* own) {
                    own_.gelu(own);  // lanes beyond the matrix are there too
                    std::memcpy(to + row * width + first, own, 4 * lanes);
                });
    }

    // Rows by expert, those that none takes left out; `choice` is -1 for them.
    const std::vector<Share>& sort(const Layer& layer, const int32_t* routes) {
        shares_.clear();
        int64_t placed = 0;
        for (int64_t b = 0; b < batch_; b++)
            room_.choice[b] = routes[b] < m_.experts ? routes[b] : -1;
        for (int64_t b = 0; b < batch_; b++) {
            const int64_t expert = room_.choice[b];
            if (expert < 0 || std::find(room_.choice, room_.choice + b, expert) != room_.choice + b)
                continue;
            const int64_t begin = placed;
            for (int64_t other = b; other < batch_; other++)
                if (room_.choice[other] == expert) room_.order[placed++] = other;
            shares_.push_back({layer.experts + expert, begin, placed});
        }
        return shares_;
    }

    // body(share, begin, end, input) for ranges of the tiles of all shares, `each` of them a share.
    template <typename Body>
    void each_share(const std::vector<Share>& shares, int64_t each, const Input& in, Body body) {
        const int64_t count = static_cast<int64_t>(shares.size());
        team_.run(count * each, kAnything, [&](const Range& range) {
            const Both both = in.of(range);
            split(range, each, [&](int64_t share, int64_t begin, int64_t end) {
                body(shares[share], begin, end, both);
            });
        });
    }

    // silu(gate x) * up x of a share's rows, for some tiles, to `inner`.
    void gate_up(const Share& share, int64_t begin, int64_t end, const Both& in, int64_t width) {
        alignas(kLine) float gate[kTogether * kRows * kTile], up[kTogether * kRows * kTile];
        const int64_t group = share.end - share.begin <= kFewRows ? kTiles : kTogether;
        for (; begin < end; begin += group) {
            const int64_t stop = std::min(begin + group, end);
            for (int64_t start = share.begin; start < share.end; start += kRows) {
                const int64_t count = std::min(kRows, share.end - start);
                const auto handfuls = [&](const Matrix& m, auto body) {
                    for (int64_t tile = begin; tile < stop; tile += kTogether)
                        body(m, tile, std::min<int64_t>(kTogether, stop - tile),
                             gate + (tile - begin) * count * kTile);
                };
                handfuls(share.expert->gate, [&](const Matrix& m, int64_t tile, int64_t taken, float* own) {
                    multiply(m, tile, taken, in, start, count, own);
                });
                handfuls(share.expert->up, [&](const Matrix& m, int64_t tile, int64_t taken, float* own) {
                    multiply(m, tile, taken, in, start, count, up);
                    kernels_.swiglu(own, up, taken * count);
                    for (int64_t t = tile; t < tile + taken; t++)
                        for (int64_t i = start; i < start + count; i++, own += kTile)
                            std::memcpy(room_.inner + i * width + t * kTile, own, 4 * kTile);
                });
            }
        }
    }

    Team& team_;
    const Model& m_;
    State* states_;
    const Step& step_;
    const bool fast_;
    const Kernels kernels_;
    const DecodeKernels own_;
    const Room& room_;
    const int64_t stretches_, batch_;
    std::vector<Share> shares_;
    std::vector<const Matrix*> matrices_;
    std::vector<char> value_;
};

thread_local Scratch scratch;

void decode(const Model& model, State* states, const Step& step, float* x, float* logits,
            int32_t* routes, float* weights, const Options& options) {
    int64_t columns = 0;
    for (int64_t i = 0; i < model.layers; i++)
        columns = std::max(columns, states[i].end + 1 - states[i].start);
    const int64_t stretches = ceil_div(columns, kStretch);
    Team team(options.threads);
    Arena sizes(nullptr);
    const Room measured(sizes, team, model, step.batch, stretches, options.fast != 0);
    Arena arena(scratch.take(sizes.used()));
    const Room room(arena, team, model, step.batch, stretches, options.fast != 0);
    Decoder(team, model, states, step, options, room, stretches).run(x, logits, routes, weights);
}

}  // namespace
}  // namespace zk

// The next token of every sequence.
//   x [batch, hidden]: embedded tokens; overwritten.
//   logits [batch, vocabulary]; routes, weights [layers, batch]: the class chosen, E = skip,
//     -1 = padding, and its probability.
// States are advanced except for `start` and `end`, which are the caller's.
ZK_EXPORT int32_t zk_decode(const zk::Model* model, zk::State* states, const zk::Step* step, float* x,
                            float* logits, int32_t* routes, float* weights,
                            const zk::Options* options) {
    try {
        zk::decode(*model, states, *step, x, logits, routes, weights, *options);
        zk::scratch.trim();
    } catch (const std::bad_alloc&) {
        return zk::kNoMemory;
    }
    return zk::kOk;
}
