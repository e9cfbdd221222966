// Blocks of ids in the order of the batch: rows of every probe at hand, and the output's gradient.

#include "contributions.h"

#include <cmath>

namespace embcompress {
namespace {

constexpr int64_t kIdsPerThread = 512;

// What multiplies the gradients of the step and bias of latents: 1 / sqrt(N * (2^bits - 1)), N
// numbers to a step (Esser et al., "Learned step size quantization", section 2.2).
float damping_of(const Lookup& lookup, const Probe& probe) {
    if (!is_latent(lookup, probe)) return 1.0f;
    const StoreView& store = lookup.stores[probe.store];
    const StoreView& scale = lookup.stores[probe.quantization.scale_store];
    const int64_t numbers = (store.rows / scale.rows) * (store.width / scale.width);
    const int64_t last = (1LL << probe.quantization.bits) - 1;
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(numbers * last)));
}

// The product of what probe t is multiplied by in column c, but for its own scale.
EMBCOMPRESS_INLINE float others_product(const RowBlock& block, int t, int i, int64_t c) {
    float value = 1.0f;
    for (int u = 0; u < block.num_probes(); ++u) {
        if (u != t) value *= block.scale(u, i) * block.pointers(u)[i][c];
    }
    return value;
}

// Gradient of the scale of probe t: the gradient's dot product with what the scale multiplies.
EMBCOMPRESS_INLINE float scale_gradient(const RowBlock& block, int t, int i,
                                        const float* gradient) {
    const Feature& feature = block.feature();
    const Probe& probe = block.probe(t);
    const float* row = block.pointers(t)[i];
    if (feature.combine == Combine::kMul) {
        return sum_of(probe.width, [&](int64_t c) {
            return gradient[c] * row[c] * others_product(block, t, i, c);
        });
    }
    const float* mine = gradient + probe.column;
    return sum_of(probe.width, [&](int64_t c) { return mine[c] * row[c]; });
}

// Adds to the gradient of the step or the bias of packed rows, column by column.
EMBCOMPRESS_INLINE void add_quantization_gradient(const Lookup& lookup, const RowBlock& block,
                                                  const Use& use, int i, const float* gradient,
                                                  float coefficient, float damping, float* out) {
    const Probe& probe = block.probe(use.probe);
    const Quantization& q = probe.quantization;
    const bool multiplies = block.feature().combine == Combine::kMul;
    const float* mine = gradient + probe.column;
    const float zero = q.bias_store < 0 ? static_cast<float>((1 << q.bits) - 1) / 2 : 0.0f;
    const int64_t row = block.rows(use.probe)[i];
    const bool latent_rows = is_latent(lookup, probe);
    coefficient *= block.scale(use.probe, i) * damping;
    for (int64_t c = 0; c < probe.width; ++c) {
        float of_step, of_bias = 1.0f;
        if (latent_rows) {
            const Latent latent = latent_at(lookup, probe, row, c);
            of_step = latent.code - (latent.inside ? latent.position : zero);
            of_bias = latent.inside ? 0.0f : 1.0f;
        } else {
            of_step = packed_code_at(lookup, probe, row, c) - zero;
        }
        float value = coefficient * mine[c] * (use.role == Role::kBias ? of_bias : of_step);
        if (multiplies) value *= others_product(block, use.probe, i, c);
        out[q.per_column ? c : 0] += value;
    }
}

EMBCOMPRESS_INLINE bool add_contributions_inline(const OutputGradient& gradient, const Use& use,
                                                 int64_t begin, int64_t end, RowBlock& block,
                                                 float* out, int64_t stride) {
    const Lookup& lookup = gradient.lookup();
    const int64_t first = ids_of(lookup, use.feature).begin;
    block.use(lookup.features[use.feature]);
    const float damping =
        use.role == Role::kScale ? 1.0f : damping_of(lookup, probe_of(lookup, use));
    int64_t touched[kBlock];
    bool valid = true;
    for (int64_t position = begin; position < end; position += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - position));
        valid &= touched_rows(lookup, use, first + position, n, block, touched);
        block.find_all(n);
        block.fetch(n);
        for (int i = 0; i < n; ++i) {
            if (touched[i] < 0) continue;
            const int64_t at = first + position + i, sample = gradient.sample(use.feature, at);
            const float* mine = gradient.of_sample(use.feature, sample);
            const float coefficient = gradient.coefficient(use.feature, at, sample);
            float* to = out + (position - begin + i) * stride;
            if (use.role == Role::kScale) {
                to[0] += coefficient * scale_gradient(block, use.probe, i, mine);
            } else {
                add_quantization_gradient(lookup, block, use, i, mine, coefficient, damping, to);
            }
        }
    }
    return valid;
}

EMBCOMPRESS_CLONES bool add_contributions_to(const OutputGradient& gradient, const Use& use,
                                             int64_t begin, int64_t end, RowBlock& block,
                                             float* out, int64_t stride) {
    return add_contributions_inline(gradient, use, begin, end, block, out, stride);
}

// (width, out_width) += transposed vectors * gradients of the outputs
void add_outer(const Product& product) { EMBCOMPRESS_WITH_LANES(multiply<lanes>(product)); }

// Gradient of the per-sample weights of one feature: its vector times the output's gradient.
EMBCOMPRESS_CLONES bool weights_range(const OutputGradient& gradient, int64_t number, int64_t begin,
                                      int64_t end, float* out) {
    const Lookup& lookup = gradient.lookup();
    const Feature& feature = lookup.features[number];
    RowBlock block(lookup, feature);
    bool valid = true;
    for (int64_t position = begin; position < end; position += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - position));
        valid &= block.load_ids(position, n);
        block.find_all(n);
        block.fetch(n);
        for (int i = 0; i < n; ++i) {
            const int64_t sample = gradient.sample(number, position + i);
            const float* mine = gradient.of_sample(number, sample);
            const int probes = feature.combine == Combine::kMul ? 1 : block.num_probes();
            float total = 0.0f;
            for (int t = 0; t < probes && !block.skipped(i); ++t) {
                total += block.scale(t, i) * scale_gradient(block, t, i, mine);
            }
            out[position + i] = total;
        }
    }
    return valid;
}

}  // namespace

int64_t contribution_width(const Lookup& lookup, const Use& use) {
    if (use.role == Role::kScale) return 1;
    const Probe& probe = probe_of(lookup, use);
    return probe.quantization.per_column ? probe.width : 1;
}

int64_t contribution_column(const Lookup& lookup, const Use& use) {
    return use.role == Role::kScale ? probe_of(lookup, use).scale.column : 0;
}

bool add_contributions(const OutputGradient& gradient, const Use& use, int64_t begin, int64_t end,
                       RowBlock& block, float* out, int64_t stride) {
    return add_contributions_to(gradient, use, begin, end, block, out, stride);
}

bool add_head_gradient(const OutputGradient& gradient, int64_t feature, int64_t begin, int64_t end,
                       float* out) {
    const Lookup& lookup = gradient.lookup();
    const Feature& which = lookup.features[feature];
    std::vector<float> vectors(kBlock * which.width);
    bool valid = true;
    for (int64_t sample = begin; sample < end; sample += kBlock) {
        const int64_t last = std::min<int64_t>(sample + kBlock, end);
        valid &= pool_before_head(lookup, feature, sample, last, vectors.data());
        add_outer({vectors.data(), 1, which.width, gradient.after_head(feature, sample),
                   lookup.header.num_columns, out, which.out_width, which.width, last - sample,
                   which.out_width, true});
    }
    return valid;
}

bool weights_gradient(const Lookup& lookup, const float* grad, float* out, int num_threads) {
    const OutputGradient gradient(lookup, grad, num_threads);
    std::atomic<bool> valid{true};
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Range ids = ids_of(lookup, f);
        const int parts =
            static_cast<int>(std::clamp<int64_t>(ids.size() / kIdsPerThread, 1, num_threads));
        parallel(parts, [&](int part) {
            const int64_t from = ids.begin + ids.size() * part / parts;
            const int64_t to = ids.begin + ids.size() * (part + 1) / parts;
            if (!weights_range(gradient, f, from, to, out)) valid = false;
        });
    }
    return valid;
}

}  // namespace embcompress
