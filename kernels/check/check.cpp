// Runs the library over a matrix of grids, shapes, precisions, instruction sets and threads, and
// compares with sums in fp64.  tools/check_kernels.py builds it: with sanitizers, or for another
// processor.  Every array is allocated at its exact size, so that a sanitizer sees what leaves it.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "layout.h"

using namespace zk;

extern "C" {
int32_t zk_best_isa();
int64_t zk_packed_bytes(const Matrix*);
void zk_pack(const Matrix*, const Source*, int32_t threads);
void zk_unpack_rows(const Matrix*, const int64_t* rows, int64_t count, float* out);
uint32_t zk_read(const Region*, int64_t count, int32_t threads);
int32_t zk_linear(const Matrix*, const float* x, int64_t count, const float* bias, float* out,
                  const Options*);
int32_t zk_moe_ffn(const Run*, int64_t count, const int64_t* order, const float* x,
                   const float* weights, float* out, const Options*);
}

namespace {

std::mt19937 generator(1);
int64_t done = 0, wrong = 0;

double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(generator);
}

uint16_t half(float value) {  // of normal numbers that fp16 has
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits & 0x7FFFFFFF) >> 13) - (112 << 10)));
}

float rounded(double value) {  // to what every type of scale can hold
    uint32_t bits;
    const float narrow = static_cast<float>(value);
    std::memcpy(&bits, &narrow, 4);
    bits &= 0xFFFF0000u;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

struct Packed {
    Matrix matrix{};
    std::unique_ptr<uint8_t, decltype(&std::free)> data{nullptr, &std::free};
    std::vector<float> values;
    double reach = 0;  // of what is added and cancels: 0 without offsets
};

std::vector<uint8_t> numbers(int64_t count, int32_t type, double low, double high, double& most) {
    const int64_t size = number_bytes(type);
    std::vector<uint8_t> bytes(count * size);
    for (int64_t i = 0; i < count; i++) {
        const float value = type == kProduct ? std::floor(uniform(-32, 32)) : rounded(uniform(low, high));
        most = std::max<double>(most, std::fabs(value));
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t narrow = type == kFloat16 ? half(value) : static_cast<uint16_t>(bits >> 16);
        const int8_t integer = static_cast<int8_t>(value);
        if (type == kFloat32) std::memcpy(&bytes[i * size], &bits, 4);
        else if (type == kProduct) std::memcpy(&bytes[i * size], &integer, 1);
        else std::memcpy(&bytes[i * size], &narrow, 2);
    }
    return bytes;
}

Packed make(int64_t rows, int64_t columns, int32_t bits, int32_t group, int32_t type, int32_t form) {
    Packed made;
    made.matrix = {nullptr, rows, columns, bits, group, type, form};
    const int64_t groups = ceil_div(columns, group), outer = ceil_div(columns, 256);
    std::vector<uint8_t> codes(rows * columns), zeros(rows * groups);
    for (auto& code : codes) code = generator() & (bits == 4 ? 15 : 255);
    for (auto& zero : zeros) zero = generator() & (bits == 4 ? 15 : 255);
    double scale = 0, minimum = 0, d = 0, m = 0;
    const auto scales = numbers(rows * groups, type, 0.01, 0.1, scale);
    const auto minima = numbers(rows * groups, type, -0.1, -0.01, minimum);
    const auto outer_scales = numbers(rows * outer, kFloat16, 0.001, 0.003, d);
    const auto outer_minima = numbers(rows * outer, kFloat16, -0.01, -0.001, m);
    Source source{};
    source.codes = codes.data();
    source.scales = scales.data();
    source.offsets = form == kZeroPoints ? zeros.data() : form == kMinima ? minima.data() : nullptr;
    if (type == kProduct) {
        source.outer_scales = reinterpret_cast<const uint16_t*>(outer_scales.data());
        source.outer_offsets = reinterpret_cast<const uint16_t*>(outer_minima.data());
    }
    source.group = group;
    source.outer = 256;
    const int64_t bytes = zk_packed_bytes(&made.matrix);
    made.data.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)));
    made.matrix.data = made.data.get();
    zk_pack(&made.matrix, &source, 2);
    const int64_t part = bytes / 3;
    const Region regions[] = {{made.data.get(), part}, {made.data.get() + part, bytes - part}};
    zk_read(regions, 2, 2);
    made.values.resize(rows * columns);
    std::vector<int64_t> all(rows);
    for (int64_t i = 0; i < rows; i++) all[i] = i;
    zk_unpack_rows(&made.matrix, all.data(), rows, made.values.data());
    if (form == kZeroPoints || form == kMinima)
        made.reach = (1 << bits) * scale * (type == kProduct ? d : 1) +
                     minimum * (type == kProduct ? m : 1);
    return made;
}

std::vector<float> floats(int64_t count) {
    std::vector<float> values(count);
    for (auto& value : values) value = static_cast<float>(uniform(-1, 1));
    return values;
}

void expect(bool right, const char* what, const Matrix& m, const Options& options) {
    done++;
    if (right || wrong++ > 20) return;
    std::printf("wrong: %s, %d bits, group %d, scales %d, form %d, %lldx%lld, fast %d, isa %d, threads %d\n",
                what, m.bits, m.group, m.scale_type, m.form, static_cast<long long>(m.rows),
                static_cast<long long>(m.columns), options.fast, options.isa, options.threads);
}

void check_linear(const Packed& packed, int64_t count, const Options& options) {
    const Matrix& m = packed.matrix;
    const std::vector<float> x = floats(count * m.columns), bias = floats(m.rows);
    std::vector<float> out(count * m.rows);
    zk_linear(&m, x.data(), count, bias.data(), out.data(), &options);
    bool right = true;
    for (int64_t i = 0; i < count; i++)
        for (int64_t row = 0; row < m.rows; row++) {
            double sum = bias[row], bound = 1e-7;
            for (int64_t block = 0; block < m.columns; block += kBlock) {
                double largest = 0, weights = 0;
                for (int64_t c = block; c < std::min<int64_t>(block + kBlock, m.columns); c++) {
                    const double weight = packed.values[row * m.columns + c];
                    const double own = x[i * m.columns + c];
                    sum += weight * own;
                    largest = std::max(largest, std::fabs(own));
                    weights += std::fabs(weight);
                    bound += 1e-7 * (m.columns + 16) * std::fabs(own) * (std::fabs(weight) + packed.reach);
                }
                bound += largest * weights * (options.fast ? 1 / 254.0 : 0x1p-23);
            }
            right = right && std::fabs(out[i * m.rows + row] - sum) <= bound;
        }
    expect(right, "linear", m, options);
}

// Two experts, of which rows out of order take one, the other, or none.
void check_ffn(int32_t bits, int32_t group, int32_t form, int64_t count, const Options& options) {
    constexpr int64_t kWidth = 72, kHidden = 100;
    std::vector<Packed> experts;
    for (int i = 0; i < 2; i++) {
        experts.push_back(make(kHidden, kWidth, bits, group, kFloat16, form));
        experts.push_back(make(kHidden, kWidth, bits, group, kFloat16, form));
        experts.push_back(make(kWidth, kHidden, bits, group, kFloat16, form));
    }
    const int64_t first = count / 3, second = count - first;
    std::vector<int64_t> order(count + 1);
    for (int64_t i = 0; i <= count; i++) order[i] = (i * 7 + 3) % (count + 1);
    if ((count + 1) % 7 == 0)
        for (int64_t i = 0; i <= count; i++) order[i] = count - i;
    std::vector<Run> runs;
    const auto run = [&](int first_matrix, int64_t begin, int64_t end) {
        const Packed* three = &experts[first_matrix];
        runs.push_back({&three[0].matrix, &three[1].matrix, &three[2].matrix, begin, end});
    };
    if (first) run(0, 0, first);
    if (second) run(3, first, count);
    const std::vector<float> x = floats((count + 1) * kWidth), shares = floats(count + 1);
    std::vector<float> out((count + 1) * kWidth, 7.0f);
    zk_moe_ffn(runs.data(), static_cast<int64_t>(runs.size()), order.data(), x.data(), shares.data(),
               out.data(), &options);
    double difference = 0, size = 1e-9;
    for (int64_t i = 0; i < count; i++) {
        const Packed* three = &experts[i < first ? 0 : 3];
        const int64_t row = order[i];
        std::vector<double> inner(kHidden);
        for (int64_t h = 0; h < kHidden; h++) {
            double gate = 0, up = 0;
            for (int64_t c = 0; c < kWidth; c++) {
                gate += static_cast<double>(three[0].values[h * kWidth + c]) * x[row * kWidth + c];
                up += static_cast<double>(three[1].values[h * kWidth + c]) * x[row * kWidth + c];
            }
            inner[h] = gate / (1 + std::exp(-gate)) * up;
        }
        for (int64_t c = 0; c < kWidth; c++) {
            double sum = 0;
            for (int64_t h = 0; h < kHidden; h++) sum += inner[h] * three[2].values[c * kHidden + h];
            sum *= shares[row];
            difference += std::pow(out[row * kWidth + c] - sum, 2);
            size += sum * sum;
        }
    }
    bool untouched = true;
    for (int64_t c = 0; c < kWidth; c++) untouched = untouched && out[order[count] * kWidth + c] == 7.0f;
    const double limit = options.fast ? 0.02 : 1e-5;
    expect(untouched && std::sqrt(difference / size) < limit, "ffn", experts[0].matrix, options);
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{1, 1}, {5, 31}, {17, 129}, {33, 1024}, {70, 1100}};
    int64_t turn = 0;
    for (int32_t bits : {4, 8})
        for (int32_t form : {kSymmetric, kZeroPoints, kMinima, kLevels})
            for (int32_t group : {16, 32, 64, 128})
                for (int32_t type : {kFloat32, kBFloat16, kFloat16, kProduct}) {
                    if ((form == kLevels && bits == 8) || (form == kZeroPoints && type == kProduct)) continue;
                    for (const auto& shape : shapes) {
                        const Packed packed = make(shape[0], shape[1], bits, group, type, form);
                        for (int32_t isa = 0; isa <= zk_best_isa(); isa++)
                            for (int32_t fast : {0, 1}) {
                                const int64_t counts[] = {0, 1, 2, 3, 4, 7, 9};
                                check_linear(packed, counts[turn++ % 7], {fast, isa, 1 + static_cast<int32_t>(turn % 3), 0});
                            }
                    }
                }
    for (int32_t isa = 0; isa <= zk_best_isa(); isa++)
        for (int32_t fast : {0, 1})
            for (int32_t bits : {4, 8})
                for (int64_t count : {1, 2, 5, 70, 140})
                    check_ffn(bits, bits == 4 ? 32 : 128, kSymmetric, count, {fast, isa, 3, 0});

    const Packed packed = make(600, 256, 4, 32, kFloat16, kSymmetric);
    const Options options{1, zk_best_isa(), 3, 0};
    const std::vector<float> x = floats(5 * 256);
    std::vector<float> wanted(5 * 600);
    zk_linear(&packed.matrix, x.data(), 5, nullptr, wanted.data(), &options);
    std::atomic<int> different{0};
    const auto call = [&](int64_t count, int32_t threads) {
        const Options own{1, options.isa, threads, 0};
        std::vector<float> out(count * 600);
        zk_linear(&packed.matrix, x.data(), count, nullptr, out.data(), &own);
        different += !std::equal(out.begin(), out.end(), wanted.begin());
    };

    // Calls in turn for different numbers of threads: some of one are late for it, and in the next.
    std::vector<std::thread> callers;
    std::atomic<int> turns{0};
    for (int i = 0; i < 2; i++)
        callers.emplace_back([&, i] {
            for (int turn = 0; turn < 4000; turn++, turns++) {
                while (turns % 2 != i) std::this_thread::yield();
                call(1 + turn % 4, i ? 2 : 6);
            }
        });
    for (auto& caller : callers) caller.join();
    callers.clear();

    // Callers at once: one of them has the pool.
    for (int i = 0; i < 4; i++)
        callers.emplace_back([&] {
            for (int turn = 0; turn < 100; turn++) call(1 + turn % 5, 3);
        });
    for (auto& caller : callers) caller.join();
    expect(different == 0, "callers in turn and at once", packed.matrix, options);
    std::printf("%lld checks, %lld wrong, instruction sets 0 to %d\n", static_cast<long long>(done),
                static_cast<long long>(wrong), zk_best_isa());
    return wrong ? 1 : 0;
}
