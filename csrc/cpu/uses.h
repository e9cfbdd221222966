// The parts that a store plays in a lookup: whose gradients add up to its own.

#pragma once

#include <vector>

#include "rows.h"

namespace embcompress {

// Rows that are gathered, learned scales, steps and biases of packed rows, or a head.
enum class Role { kRows, kScale, kStep, kBias, kHead };

struct Use {
    int64_t feature;  // its number
    int probe;        // its number in the feature; -1: a head
    Role role;
    int64_t piece = 0;  // of the probe's row; not 0 only where rows overlap
};

inline const Probe& probe_of(const Lookup& lookup, const Use& use) {
    return lookup.probes[lookup.features[use.feature].first_probe + use.probe];
}

// How many rows of a store's tensor a gathered row is: several where rows overlap.
inline int64_t pieces_of(const Lookup& lookup, const Probe& probe) {
    if (probe.stride == probe.width) return 1;
    return probe.width / lookup.stores[probe.store].width;
}

// Rows that overlap are used piece by piece, so that every number is in one row.
inline std::vector<Use> uses_of(const Lookup& lookup, int64_t store) {
    std::vector<Use> uses;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        for (int t = 0; t < feature.num_probes; ++t) {
            const Probe& probe = lookup.probes[feature.first_probe + t];
            const Quantization& q = probe.quantization;
            for (int64_t p = 0; probe.store == store && p < pieces_of(lookup, probe); ++p) {
                uses.push_back({f, t, Role::kRows, p});
            }
            if (probe.scale.kind == ScaleKind::kWeight && probe.scale.store == store) {
                uses.push_back({f, t, Role::kScale});
            }
            if (q.bits > 0 && q.scale_store == store) uses.push_back({f, t, Role::kStep});
            if (q.bits > 0 && q.bias_store == store) uses.push_back({f, t, Role::kBias});
        }
        if (feature.head_store == store) uses.push_back({f, -1, Role::kHead});
    }
    return uses;
}

// The row of the store that every id of a block touches through a use that is no head; -1: none.
// False for an id outside the vocabulary. `block` was turned to the use's feature.
EMBCOMPRESS_INLINE bool touched_rows(const Lookup& lookup, const Use& use, int64_t position, int n,
                                     RowBlock& block, int64_t* rows) {
    const bool valid = block.load_ids(position, n);
    const Probe& probe = probe_of(lookup, use);
    if (use.role == Role::kScale) {
        for (int i = 0; i < n; ++i) {
            rows[i] = block.skipped(i) ? -1 : scale_row(lookup, probe.scale, block.ids()[i]);
        }
        return valid;
    }
    block.find_rows(use.probe, n);
    const int64_t* found = block.rows(use.probe);
    const bool one_row = use.role != Role::kRows && !probe.quantization.per_row;
    for (int i = 0; i < n; ++i) {
        rows[i] = found[i] < 0 || block.skipped(i) ? -1 : one_row ? 0 : found[i];
    }
    if (use.role == Role::kRows && probe.stride != probe.width) {
        const int64_t apart = probe.stride / lookup.stores[probe.store].width;
        for (int i = 0; i < n; ++i) rows[i] = rows[i] < 0 ? -1 : rows[i] * apart + use.piece;
    }
    return valid;
}

}  // namespace embcompress
