// From checked arguments to what the kernels take: plans with their stores, launches, backward
// passes.

#pragma once

#include <algorithm>
#include <map>
#include <utility>

#include "feature_records.h"
#include "kernels.h"

namespace embcompress {
namespace cuda {

inline Inputs bind_inputs(const Lookup& lookup) {
    Inputs inputs{};
    inputs.ids = lookup.ids;
    inputs.offsets = lookup.offsets;
    inputs.weights = lookup.weights;
    inputs.num_ids = lookup.num_ids;
    inputs.num_offsets = lookup.num_offsets;
    inputs.batch = lookup.batch;
    inputs.num_columns = lookup.header.num_columns;
    inputs.errors = error_flags();
    inputs.weights_dtype = lookup.weights_dtype;
    inputs.ids_are_32_bit = lookup.ids_are_32_bit;
    return inputs;
}

// Begins a plan: the records of all features. Returns the features.
inline std::vector<BoundFeature> add_records(const Lookup& lookup, PlanWords& plan) {
    std::vector<BoundFeature> features;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        const FeatureRecords records(lookup, feature, plan.words);
        features.push_back({feature.num_embeddings, feature.padding_idx, feature.pool,
                            feature.combine, feature.width, feature.out_column, feature.num_probes,
                            records.begin(), records.size()});
        plan.layout.most_probes =
            std::max(plan.layout.most_probes, static_cast<int32_t>(feature.num_probes));
    }
    plan.layout.features = plan.add(features.data(), lookup.header.num_features);
    plan.layout.num_features = static_cast<int32_t>(lookup.header.num_features);
    return features;
}

// ------------------------------------------------------------------------------------ forward

struct ForwardPlan {
    PlanWords words;
    std::vector<PoolLaunch> launches;
};

// Features that the same kernel runs with the same lanes go into one launch.
inline ForwardPlan plan_forward(const Lookup& lookup, const DeviceLimits& device) {
    ForwardPlan plan;
    const std::vector<BoundFeature> bound = add_records(lookup, plan.words);
    struct Members {
        FeatureClass which;
        std::vector<int64_t> features;
        int64_t staged_bytes;
        int64_t record_bytes;
        int64_t width;
        int64_t probes;
    };
    std::vector<Members> classes;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        BoundProbe* probes =
            reinterpret_cast<BoundProbe*>(plan.words.words.data() + bound[f].records);
        const FeatureClass which = classify(feature, probes);
        auto found = std::find_if(classes.begin(), classes.end(),
                                  [&](const Members& each) { return each.which == which; });
        if (found == classes.end()) found = classes.insert(found, Members{which, {}, 0, 0, 0, 0});
        found->features.push_back(f);
        found->staged_bytes = std::max(found->staged_bytes, stage_stores(feature, probes));
        found->record_bytes = std::max(found->record_bytes, 8 * bound[f].num_words);
        found->width = std::max(found->width, feature.width);
        found->probes = std::max(found->probes, feature.num_probes);
    }
    std::vector<int64_t> order;
    const int64_t bags = std::max<int64_t>(1, lookup.header.num_features * lookup.batch);
    for (const Members& each : classes) {
        const int64_t count = static_cast<int64_t>(each.features.size());
        const PoolShape shape =
            each.which.kind == Kind::kAny
                ? pool_shape(each.which, lookup.batch, count, lookup.num_ids / bags, each.probes,
                             each.width, each.record_bytes, each.staged_bytes, device)
                : plain_shape(each.which, lookup.batch, count, lookup.num_ids / bags, each.width,
                              device);
        plan.launches.push_back({each.which, shape, static_cast<int64_t>(order.size()), count,
                                 static_cast<int32_t>(each.probes)});
        order.insert(order.end(), each.features.begin(), each.features.end());
    }
    plan.words.layout.order = plan.words.add(order.data(), static_cast<int64_t>(order.size()));
    return plan;
}

// ----------------------------------------------------------------------------------- backward

// What the wanted stores are to the probes of each feature, the same number for every feature.
inline std::vector<Use> find_uses(const Lookup& lookup, const std::vector<int64_t>& wanted,
                                  int32_t* uses_per_feature) {
    std::map<int64_t, int64_t> targets;
    for (size_t k = 0; k < wanted.size(); ++k) targets[wanted[k]] = static_cast<int64_t>(k);
    std::vector<std::vector<Use>> uses(lookup.header.num_features);
    size_t most = 0;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        for (int32_t t = 0; t < feature.num_probes; ++t) {
            const Probe& probe = lookup.probes[feature.first_probe + t];
            const Quantization& q = probe.quantization;
            const bool weighted = probe.scale.kind == ScaleKind::kWeight;
            const std::pair<int64_t, Role> roles[] = {
                {probe.store, Role::kRows},
                {weighted ? probe.scale.store : -1, Role::kScale},
                {q.bits > 0 ? q.scale_store : -1, Role::kStep},
                {q.bits > 0 ? q.bias_store : -1, Role::kBias},
            };
            for (const auto& [store, role] : roles) {
                const auto found = targets.find(store);
                if (found != targets.end()) uses[f].push_back({t, role, found->second});
            }
        }
        most = std::max(most, uses[f].size());
    }
    std::vector<Use> flat;
    for (std::vector<Use>& each : uses) {
        each.resize(most, Use{-1, Role::kRows, 0});
        flat.insert(flat.end(), each.begin(), each.end());
    }
    *uses_per_feature = static_cast<int32_t>(most);
    return flat;
}

inline bool has_scalars(const Lookup& lookup, const std::vector<Use>& uses, int32_t per_feature) {
    for (size_t i = 0; i < uses.size(); ++i) {
        if (uses[i].probe < 0 || uses[i].role == Role::kRows) continue;
        const Feature& feature = lookup.features[i / per_feature];
        const Probe& probe = lookup.probes[feature.first_probe + uses[i].probe];
        if (uses[i].role == Role::kScale || !probe.quantization.per_column) return true;
    }
    return false;
}

// Whether some gradient depends on stored numbers, so that no row may move before all are complete.
inline bool gradients_read_rows(const Lookup& lookup) {
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        if (feature.combine == Combine::kMul && feature.num_probes > 1) return true;
        for (int64_t t = 0; t < feature.num_probes; ++t) {
            const Probe& probe = lookup.probes[feature.first_probe + t];
            if (probe.quantization.bits > 0 || probe.scale.kind == ScaleKind::kWeight) return true;
        }
    }
    return false;
}

// Targets that are one tensor under several names are updated in turn. Returns how many turns.
inline int number_rounds(std::vector<Target>& targets) {
    int most = 1;
    for (size_t k = 0; k < targets.size(); ++k) {
        targets[k].round = 0;
        for (size_t before = 0; before < k; ++before) {
            if (targets[before].data == targets[k].data) {
                targets[k].round = targets[before].round + 1;
            }
        }
        most = std::max(most, targets[k].round + 1);
    }
    return most;
}

// Rows up to this wide are updated as soon as their gradient is complete.
constexpr int64_t kWidestGroup = 128;

struct BackwardPlan {
    PlanWords words;
    Backward backward;
};

inline BackwardPlan plan_backward(const Lookup& lookup, const std::vector<int64_t>& wanted,
                                  std::vector<Target> targets, SinkKind sink) {
    BackwardPlan plan{};
    Backward& backward = plan.backward;
    add_records(lookup, plan.words);
    PlanLayout& layout = plan.words.layout;
    const std::vector<Use> uses = find_uses(lookup, wanted, &layout.uses_per_feature);
    backward.rounds = number_rounds(targets);
    layout.uses = plan.words.add(uses.data(), static_cast<int64_t>(uses.size()));
    layout.targets = plan.words.add(targets.data(), static_cast<int64_t>(targets.size()));
    layout.num_targets = static_cast<int32_t>(targets.size());
    backward.inputs = bind_inputs(lookup);
    backward.key = key_shape(targets);
    backward.num_bags = lookup.header.num_features * lookup.batch;
    for (const Target& target : targets) backward.widest = std::max(backward.widest, target.width);
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        backward.widest_feature = std::max(backward.widest_feature, lookup.features[f].width);
    }
    if (sink == SinkKind::kUpdate &&
        (gradients_read_rows(lookup) || backward.rounds > 1 || backward.widest > kWidestGroup)) {
        sink = SinkKind::kCompact;
    }
    backward.sink = sink;
    backward.has_scalars = has_scalars(lookup, uses, layout.uses_per_feature);
    const int64_t touches = lookup.num_ids * layout.uses_per_feature;
    const bool sorted = sink != SinkKind::kAtomic && touches > 0;
    const int64_t scratch =
        sorted ? static_cast<int64_t>(scratch_bytes(touches, backward.key.bits)) : 0;
    const BackwardOptions options{sink == SinkKind::kCompact, sorted, backward.has_scalars};
    backward.layout =
        backward_layout(targets, lookup.num_ids, layout.uses_per_feature, options, scratch);
    return plan;
}

}  // namespace cuda
}  // namespace embcompress
