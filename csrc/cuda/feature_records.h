// From the records of plan.h to those that the kernels read: of each probe what it has, with the
// stores it reads.

#pragma once

#include <cstring>
#include <vector>

#include "device_plan.h"

namespace embcompress {
namespace cuda {

inline StoreView store_or_none(const Lookup& lookup, int64_t number) {
    return number < 0 ? StoreView{} : lookup.stores[number];
}

// How many columns of a probe's rows are one aligned access: 8, 4, 2 or 1.
inline int32_t vector_columns(const StoreView& store, const Probe& probe) {
    if (reinterpret_cast<uintptr_t>(store.data) % 16 != 0) return 1;
    const int64_t both = probe.width | probe.column;
    return both % 8 == 0 ? 8 : (both % 4 == 0 ? 4 : (both % 2 == 0 ? 2 : 1));
}

// Writes the probes of a feature to a plan, and after them what they have beside a store.
class FeatureRecords {
  public:
    FeatureRecords(const Lookup& lookup, const Feature& feature, std::vector<int64_t>& words)
        : lookup_(lookup), words_(words), begin_(next()) {
        words_.resize(begin_ + feature.num_probes * kProbeWords);
        for (int64_t t = 0; t < feature.num_probes; ++t) {
            bind(begin_ + t * kProbeWords, lookup.probes[feature.first_probe + t]);
        }
    }
    int64_t begin() const { return begin_; }
    int64_t size() const { return next() - begin_; }

  private:
    static constexpr int64_t kProbeWords = sizeof(BoundProbe) / 8;

    void bind(int64_t at, const Probe& probe) {
        BoundProbe bound{};
        bound.store = lookup_.stores[probe.store];
        bound.address = probe.address;
        bound.offset = probe.offset;
        bound.column = static_cast<int32_t>(probe.column);
        bound.width = static_cast<int32_t>(probe.width);
        bound.bits = static_cast<int32_t>(probe.quantization.bits);
        bound.vector_columns = vector_columns(bound.store, probe);
        bound.staged_at = -1;
        bound.code_at = static_cast<int32_t>(add_code(probe.code, at));
        bound.scale_at = static_cast<int32_t>(add_scale(probe.scale, at));
        bound.steps_at = static_cast<int32_t>(add_steps(probe.quantization, at));
        std::memcpy(words_.data() + at, &bound, sizeof(bound));
    }

    // Words from the record at `from` to a new one; 0 is no record.
    template <typename T>
    int64_t add(const T& record, int64_t from) {
        const int64_t at = static_cast<int64_t>(words_.size());
        words_.resize(at + static_cast<int64_t>(sizeof(T) / 8));
        std::memcpy(words_.data() + at, &record, sizeof(T));
        return at - from;
    }
    int64_t next() const { return static_cast<int64_t>(words_.size()); }

    BoundTable bind_table(const CodeTable& table) const {
        const StoreView& store = lookup_.stores[table.store];
        return {table, store.data, store.bytes};
    }

    int64_t add_code(const Code& code, int64_t from) {
        if (code.table.store < 0) return 0;
        BoundCode bound{bind_table(code.table), code.has_otherwise, code.otherwise, 0};
        const int64_t at = next();
        // Absent ids may have an address, in another table or not; what was not checked is not
        // read.
        const bool goes_on = code.has_otherwise && code.other.store >= 0;
        if (goes_on) bound.other_at = static_cast<int64_t>(sizeof(BoundCode) / 8);
        add(bound, from);
        if (goes_on) add(bind_table(code.other), at);
        return at - from;
    }

    int64_t add_scale(const Scale& scale, int64_t from) {
        if (scale.kind == ScaleKind::kNone) return 0;
        BoundScale bound{scale.kind, scale.key, scale.column, scale.address, StoreView{}, 0};
        if (scale.kind == ScaleKind::kWeight) bound.store = lookup_.stores[scale.store];
        const bool coded = scale.kind == ScaleKind::kWeight && scale.code.table.store >= 0;
        const int64_t at = next();
        if (coded) bound.code_at = static_cast<int64_t>(sizeof(BoundScale) / 8);
        add(bound, from);
        if (coded) add_code(scale.code, at);
        return at - from;
    }

    int64_t add_steps(const Quantization& quantization, int64_t from) {
        if (quantization.bits == 0) return 0;
        BoundSteps bound{};
        bound.step = store_or_none(lookup_, quantization.scale_store);
        bound.bias = store_or_none(lookup_, quantization.bias_store);
        bound.has_bias = quantization.bias_store >= 0;
        bound.per_row = quantization.per_row != 0;
        bound.per_column = quantization.per_column;
        return add(bound, from);
    }

    const Lookup& lookup_;
    std::vector<int64_t>& words_;
    int64_t begin_;
};

}  // namespace cuda
}  // namespace embcompress
