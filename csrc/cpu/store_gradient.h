// What adds up to the gradient of one store: its uses, and how each is added up.

#pragma once

#include <algorithm>
#include <vector>

#include "contributions.h"
#include "grouped_rows.h"
#include "lines.h"

namespace embcompress {

struct StoreGradient;

// How the entries of a use become what is added to a row.
struct Source {
    Use use;
    const Feature* feature;
    const Probe* probe;
    int64_t first;             // position of the feature's first id
    std::vector<float> added;  // (ids, width), where the use is no row: what each id adds
    int64_t width;
    int64_t column;        // of the row, where the width begins
    int64_t first_column;  // of the probe's row, likewise
    int64_t pieces;        // how many rows of the store's tensor the width fills
    bool is_product;
    bool has_coefficients;
    StoreGradient* joint;  // of the other factor, where its gradient is added up along; or nullptr
};

// What some ids add to a whole store: the sums, and which rows they touch.
struct Sums {
    LineFloats values;
    std::vector<uint8_t> touched;
};

struct StoreGradient {
    StoreView store;
    int64_t number;
    std::vector<Source> sources;   // uses whose entries are grouped
    std::vector<Source> summed;    // uses that are added up in pieces of the batch
    LineFloats sums;               // (rows, width) where there are any, or it is another's joint
    std::vector<uint8_t> touched;  // (rows,) likewise
    GroupedRows grouped;
    const Probe* latents = nullptr;  // a probe of the store, where it is held as latents

    int64_t width() const { return store.width; }
    bool has_joint() const {
        return std::any_of(sources.begin(), sources.end(),
                           [](const Source& source) { return source.joint != nullptr; });
    }
};

// Room for what the entries of each source of a gradient add to its joint.
inline std::vector<Sums> joint_sums(const StoreGradient& gradient) {
    std::vector<Sums> joint(gradient.sources.size());
    for (size_t k = 0; k < joint.size(); ++k) {
        const StoreGradient* other = gradient.sources[k].joint;
        if (other == nullptr) continue;
        joint[k].values.assign(other->sums.size(), 0.0f);
        joint[k].touched.assign(other->touched.size(), 0);
    }
    return joint;
}

// Which uses of a store are grouped by row, and which are added up in pieces of the batch.
StoreGradient gradient_of(const OutputGradient& output, int64_t number);

// Where rows of a large store are multiplied by rows of a small one, the entries of the large one
// have all that the gradient of the small one takes: it is added up along, not in a pass of its
// own.
void join_factors(const Lookup& lookup, std::vector<StoreGradient>& gradients);

// Whether the entries of a source read rows of a store while they are added up.
bool reads(const Lookup& lookup, const Source& source, int64_t store);

}  // namespace embcompress
