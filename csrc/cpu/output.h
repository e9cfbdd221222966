// The rows that a lookup writes, and whether they go past the caches.

#pragma once

#include "rows.h"
#include "vectors.h"

namespace embcompress {

// Rows of floats, a stride apart, that vectors are written to.
struct OutputRows {
    float* first;
    int64_t stride;
    bool streamed;

    OutputRows from(int64_t row) const { return {first + row * stride, stride, streamed}; }
};

// Results of so many bytes are streamed: reading the lines that are overwritten costs more than
// their next reader loses. Larger ones are new memory in every call, which is in the caches because
// the system has just filled it with zeros.
constexpr int64_t kFewestStreamed = 4 << 20;
constexpr int64_t kMostStreamed = 32 << 20;

// Whether a feature writes whole lines of the output, where each of its bags has one id.
inline bool fills_lines(const Lookup& lookup, const Feature& feature) {
    bool fills = feature.out_column % kLineFloats == 0 && feature.out_width % kLineFloats == 0;
    for (int64_t t = 0; t < feature.num_probes && feature.head_store < 0; ++t) {
        const Probe& probe = lookup.probes[feature.first_probe + t];
        fills &= probe.column % kLineFloats == 0 && probe.width % kLineFloats == 0;
    }
    return fills;
}

// A line of which a part is streamed is read, after all, and written twice. So is what is added up
// in place, as the vectors of a bag are.
inline bool is_streamed(const Lookup& lookup, const float* out) {
    const int64_t bytes = lookup.batch * lookup.header.num_columns * sizeof(float);
    const bool has_size = bytes >= kFewestStreamed && bytes < kMostStreamed;
    if (!kCanStream || !has_size || lookup.offsets != nullptr) return false;
    bool streamed = lookup.header.num_columns % kLineFloats == 0 &&
                    reinterpret_cast<uintptr_t>(out) % (kLineFloats * sizeof(float)) == 0;
    for (int64_t f = 0; f < lookup.header.num_features && streamed; ++f) {
        streamed = fills_lines(lookup, lookup.features[f]);
    }
    return streamed;
}

}  // namespace embcompress
