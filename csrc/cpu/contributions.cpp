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

// Derivatives of the numbers of a row by their step or bias: (width + kUnpacked,).
EMBCOMPRESS_INLINE void load_derivatives(const Lookup& lookup, const Probe& probe, Role role,
                                         int64_t row, float* steps, float* derivatives) {
    const Quantization& q = probe.quantization;
    const float zero = q.bias_store < 0 ? static_cast<float>((1 << q.bits) - 1) / 2 : 0.0f;
    if (!is_latent(lookup, probe)) {
        for (int64_t c = 0; c < probe.width; ++c) {
            derivatives[c] =
                role == Role::kBias ? 1.0f : packed_code_at(lookup, probe, row, c) - zero;
        }
        return;
    }
    if (q.per_row) load_steps(lookup, probe, row, steps);
    for (int64_t c = 0; c < probe.width; c += kUnpacked) {
        const Latent<Values> latents = latents_at(lookup, probe, row, c, steps);
        store_lanes(derivatives + c, role == Role::kBias ? derivative_by_bias(latents)
                                                         : derivative_by_step(latents, zero));
    }
}

// Adds what an id adds to the gradient of the step or the bias of the row it touches.
EMBCOMPRESS_INLINE void add_quantization_gradient(const RowBlock& block, const Use& use, int i,
                                                  const float* gradient, float coefficient,
                                                  const float* derivatives, float* out) {
    const Probe& probe = block.probe(use.probe);
    const bool multiplies = block.feature().combine == Combine::kMul;
    const int64_t apart = probe.quantization.per_column ? 1 : 0;
    const float* mine = gradient + probe.column;
    if (!multiplies && apart == 1) {  // what most plans have, and compilers vectorize
        for (int64_t c = 0; c < probe.width; ++c) out[c] += coefficient * mine[c] * derivatives[c];
        return;
    }
    for (int64_t c = 0; c < probe.width; ++c) {
        float value = coefficient * mine[c] * derivatives[c];
        if (multiplies) value *= others_product(block, use.probe, i, c);
        out[c * apart] += value;
    }
}

// What the contributions of a block are computed from: rows of all probes where these are
// multiplied, else only what the use itself reads.
EMBCOMPRESS_INLINE void find_contributing(const Use& use, int n, RowBlock& block) {
    if (block.feature().combine == Combine::kMul) {
        block.find_all(n);
        block.fetch(n);
    } else if (use.role == Role::kScale) {
        block.find_rows(use.probe, n);
        block.find_pointers(use.probe, n);
        block.fetch_rows(use.probe, 0, n);
    } else {
        block.find_scales(use.probe, n);
    }
}

EMBCOMPRESS_INLINE bool add_contributions_inline(const OutputGradient& gradient, const Use& use,
                                                 int64_t begin, int64_t end, RowBlock& block,
                                                 float* out, int64_t stride) {
    const Lookup& lookup = gradient.lookup();
    const Probe& probe = probe_of(lookup, use);
    const int64_t first = ids_of(lookup, use.feature).begin;
    block.use(lookup.features[use.feature]);
    const float damping = use.role == Role::kScale ? 1.0f : damping_of(lookup, probe);
    std::vector<float> derivatives(probe.width + kUnpacked);
    int64_t touched[kBlock];
    bool valid = true;
    for (int64_t position = begin; position < end; position += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - position));
        valid &= touched_rows(lookup, use, first + position, n, block, touched);
        find_contributing(use, n, block);
        if (use.role != Role::kScale && !probe.quantization.per_row) {
            load_steps(lookup, probe, 0, block.steps());
        }
        for (int i = 0; i < n; ++i) {
            if (touched[i] < 0) continue;
            const int64_t at = first + position + i, sample = gradient.sample(use.feature, at);
            const float* mine = gradient.of_sample(use.feature, sample);
            const float coefficient = gradient.coefficient(use.feature, at, sample);
            float* to = out + (position - begin + i) * stride;
            if (use.role == Role::kScale) {
                to[0] += coefficient * scale_gradient(block, use.probe, i, mine);
                continue;
            }
            load_derivatives(lookup, probe, use.role, block.rows(use.probe)[i], block.steps(),
                             derivatives.data());
            add_quantization_gradient(block, use, i, mine,
                                      coefficient * (block.scale(use.probe, i) * damping),
                                      derivatives.data(), to);
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
