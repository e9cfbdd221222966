#include "store_gradient.h"

namespace embcompress {
namespace {

constexpr int64_t kSmallGradient = 16384;  // numbers

// Whether a probe reads rows as they are, one for every id but padding.
bool is_plain(const Lookup& lookup, const Probe& probe) {
    return probe.code.table.store < 0 && probe.quantization.bits == 0 && !is_sparse(probe) &&
           probe.stride == probe.width && lookup.stores[probe.store].dtype == Dtype::kFloat32;
}

Source source_of(const OutputGradient& output, const Use& use, bool is_summed) {
    const Lookup& lookup = output.lookup();
    Source source{};
    source.pieces = 1;
    source.use = use;
    source.feature = &lookup.features[use.feature];
    source.first = ids_of(lookup, use.feature).begin;
    if (use.role == Role::kHead) return source;
    source.probe = &probe_of(lookup, use);
    if (use.role != Role::kRows) {
        source.width = contribution_width(lookup, use);
        source.column = contribution_column(lookup, use);
        return source;
    }
    const int64_t pieces = pieces_of(lookup, *source.probe);
    if (is_summed) source.pieces = pieces;
    source.width = source.probe->width / pieces * source.pieces;
    source.first_column = use.piece * source.width;
    source.is_product = source.feature->combine == Combine::kMul && source.feature->num_probes > 1;
    source.has_coefficients =
        output.has_coefficients(use.feature) || source.probe->scale.kind != ScaleKind::kNone;
    for (int64_t t = 0; source.is_product && t < source.feature->num_probes; ++t) {
        const Probe& other = lookup.probes[source.feature->first_probe + t];
        source.has_coefficients |= other.scale.kind != ScaleKind::kNone;
    }
    return source;
}

}  // namespace

StoreGradient gradient_of(const OutputGradient& output, int64_t number) {
    const Lookup& lookup = output.lookup();
    StoreGradient gradient{};
    gradient.store = lookup.stores[number];
    gradient.number = number;
    int64_t count = 0;
    const std::vector<Use> uses = uses_of(lookup, number);
    for (const Use& use : uses) count += ids_of(lookup, use.feature).size();
    const int64_t rows = gradient.store.rows, numbers = rows * gradient.store.width;
    const bool is_small = numbers <= kSmallGradient && rows <= count;
    for (const Use& use : uses) {
        const bool is_summed =
            use.role == Role::kHead || (use.role == Role::kRows ? is_small : rows == 1);
        // A sum takes the pieces of an overlapping row at once.
        if (is_summed && use.piece > 0) continue;
        const Source source = source_of(output, use, is_summed);
        if (use.role == Role::kRows &&
            (is_latent(lookup, *source.probe) || is_masked(lookup, *source.probe))) {
            gradient.latents = source.probe;
        }
        (is_summed ? gradient.summed : gradient.sources).push_back(source);
    }
    if (!gradient.summed.empty()) {
        gradient.sums.assign(numbers, 0.0f);
        gradient.touched.assign(rows, 0);
    }
    return gradient;
}

void join_factors(const Lookup& lookup, std::vector<StoreGradient>& gradients) {
    for (StoreGradient& gradient : gradients) {
        for (Source& source : gradient.sources) {
            if (!source.is_product || source.feature->num_probes != 2) continue;
            const int factor = 1 - source.use.probe;
            const Probe& other = lookup.probes[source.feature->first_probe + factor];
            if (!is_plain(lookup, *source.probe) || !is_plain(lookup, other)) continue;
            for (StoreGradient& small : gradients) {
                if (small.number != other.store) continue;
                const auto is_same = [&](const Source& each) {
                    return each.use.role == Role::kRows && each.use.feature == source.use.feature &&
                           each.use.probe == factor;
                };
                const auto found = std::find_if(small.summed.begin(), small.summed.end(), is_same);
                if (found == small.summed.end()) continue;
                small.summed.erase(found);
                source.joint = &small;
            }
        }
    }
}

bool reads(const Lookup& lookup, const Source& source, int64_t store) {
    for (int64_t t = 0; t < source.feature->num_probes; ++t) {
        const Probe& probe = lookup.probes[source.feature->first_probe + t];
        if (!source.is_product && t != source.use.probe) continue;
        const Quantization& q = probe.quantization;
        if (t != source.use.probe && probe.store == store) return true;
        if (probe.scale.kind == ScaleKind::kWeight && probe.scale.store == store) return true;
        if (q.bits > 0 && (q.scale_store == store || q.bias_store == store)) return true;
    }
    return false;
}

}  // namespace embcompress
