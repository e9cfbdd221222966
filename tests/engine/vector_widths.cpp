// Pools rows and applies heads with vectors of 4, 8 and 16 floats. All must give the same bits.

#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/head.h"
#include "../../csrc/cpu/pooling.h"

namespace {

using namespace embcompress;

constexpr int64_t kWidest = 200;

std::vector<float> draw(int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) {
        value = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
    }
    return values;
}

// The probes of a block of ids, whose rows lie anywhere.
struct Block {
    std::vector<float> values;
    std::vector<const float*> pointers;
    std::vector<float> scales;
    std::vector<float> weights;

    explicit Block(int probes)
        : values(draw(4096 + kWidest)),
          pointers(probes * kBlock),
          scales(draw(probes * kBlock)),
          weights(draw(kBlock)) {
        for (const float*& pointer : pointers) pointer = values.data() + std::rand() % 4096;
    }
};

// What becomes of the vectors: each is written, all are added up, or each is added to one of a few.
enum class Goal { kWritten, kOneSum, kSums };

template <int kLanes>
std::vector<float> pool(const Block& block, int probes, bool scaled, bool multiplied, Goal goal,
                        int64_t width) {
    std::vector<float> out(kBlock * width, 0.25f);
    float* sums[kBlock];
    for (int i = 0; i < kBlock; ++i) sums[i] = out.data() + i * 7 % 13 * width;
    const ProbeRows rows{block.pointers.data(), scaled ? block.scales.data() : nullptr, probes};
    Target target{3, 60, block.weights.data(), false, 0, out.data()};
    if (goal == Goal::kWritten) target.stride = width;
    if (goal == Goal::kSums) target.sums = sums;
    if (multiplied) {
        pool_probes<kLanes, true>(rows, target, width);
    } else {
        pool_probes<kLanes, false>(rows, target, width);
    }
    return out;
}

template <int kLanes>
std::vector<float> apply_head(const std::vector<float>& in, const std::vector<float>& columns,
                              int64_t rows, int64_t depth, int64_t width, bool add) {
    std::vector<float> out(rows * width, 0.25f);
    multiply<kLanes>(
        {in.data(), depth, 1, columns.data(), width, out.data(), width, rows, depth, width, add});
    return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

int different(int64_t width) {
    int count = 0;
    for (int probes = 1; probes <= 5; ++probes) {
        const Block block(probes);
        for (int options = 0; options < 12; ++options) {
            const bool scaled = options & 1, multiplied = options & 2;
            const Goal goal = static_cast<Goal>(options / 4);
            const auto narrow = pool<4>(block, probes, scaled, multiplied, goal, width);
            const auto middle = pool<8>(block, probes, scaled, multiplied, goal, width);
            const auto wide = pool<16>(block, probes, scaled, multiplied, goal, width);
            count += !same_bits(narrow, middle) + !same_bits(narrow, wide);
        }
    }
    for (int64_t rows = 1; rows <= 6; ++rows) {
        const int64_t depth = 1 + std::rand() % 20;
        const auto in = draw(rows * depth), columns = draw(depth * width);
        for (bool add : {false, true}) {
            const auto narrow = apply_head<4>(in, columns, rows, depth, width, add);
            const auto middle = apply_head<8>(in, columns, rows, depth, width, add);
            const auto wide = apply_head<16>(in, columns, rows, depth, width, add);
            count += !same_bits(narrow, middle) + !same_bits(narrow, wide);
        }
    }
    return count;
}

}  // namespace

int main() {
    std::srand(1);
    int count = 0;
    for (int64_t width = 1; width <= kWidest; ++width) count += different(width);
    std::printf("%d comparisons differ\n", count);
    return count == 0 ? 0 : 1;
}
