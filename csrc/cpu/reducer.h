// What adds up the gradients of rows: from sorted entries to the rows they touch, and from ids in
// the order of the batch to small stores.

#pragma once

#include <algorithm>
#include <vector>

#include "contributions.h"
#include "gradients.h"
#include "sorted_rows.h"

namespace embcompress {

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
};

struct StoreGradient {
    StoreView store;
    int64_t number;
    std::vector<Source> sources;   // uses whose rows are sorted
    std::vector<Source> summed;    // uses that are added up in pieces of the batch
    std::vector<float> sums;       // (rows, width) where there are any
    std::vector<uint8_t> touched;  // (rows,) likewise
    SortedRows sorted;
    const Probe* latents = nullptr;  // a probe of the store, where it is held as latents
    bool has_products = false;

    int64_t width() const { return store.width; }
};

// Gradients of latents go straight through, inside the codes' range, or where a mask keeps them.
EMBCOMPRESS_INLINE void mask_row(const Lookup& lookup, const StoreGradient& gradient, int64_t row,
                                 float* values) {
    if (gradient.latents == nullptr) return;
    if (is_sparse(*gradient.latents)) return clear_pruned(lookup, *gradient.latents, row, values);
    for (int64_t c = 0; c < gradient.width(); ++c) {
        if (!latent_at(lookup, *gradient.latents, row, c).inside) values[c] = 0.0f;
    }
}

// Where the gradients of the rows of a task go, one after another.
class Destination {
  public:
    Destination(const Lookup& lookup, const StoreGradient& gradient, const GradientSink& sink,
                int64_t first_row)
        : lookup_(lookup), gradient_(gradient), sink_(sink), next_(first_row) {
        if (sink.updated != nullptr) own_.resize(gradient.width());
    }

    // Where the gradient of a row is added up, and whether it starts from nothing.
    EMBCOMPRESS_INLINE float* start(int64_t row) {
        row_ = row;
        if (sink_.dense != nullptr) return sink_.dense + row * gradient_.width();
        float* target =
            sink_.updated != nullptr ? own_.data() : sink_.values + next_ * gradient_.width();
        // Uses may add to some columns only.
        if (!starts_from_nothing()) std::fill(target, target + gradient_.width(), 0.0f);
        if (sink_.rows != nullptr) sink_.rows[next_] = row;
        ++next_;
        return target;
    }
    bool starts_from_nothing() const {
        return sink_.dense == nullptr && gradient_.sources.size() == 1 &&
               gradient_.sources[0].width == gradient_.width();
    }
    EMBCOMPRESS_INLINE void prefetch(int64_t row) const {
        if (sink_.updated != nullptr) sink_.updated->prefetch(row);
    }
    EMBCOMPRESS_INLINE void finish(float* target) {
        mask_row(lookup_, gradient_, row_, target);
        if (sink_.updated != nullptr) sink_.updated->update(row_, target);
    }

  private:
    const Lookup& lookup_;
    const StoreGradient& gradient_;
    const GradientSink& sink_;
    int64_t next_;
    int64_t row_ = 0;
    std::vector<float> own_;
};

// Some entries: what each adds to its row, as factors of a product, and the number before it.
struct Entries {
    int count;
    int64_t rows[kBlock];
    int32_t sources[kBlock];
    int64_t positions[kBlock];
    float coefficients[kBlock];
    std::vector<const float*> factors;  // kBlock of each
};

class Reducer {
  public:
    Reducer(const OutputGradient& output, int64_t most_probes)
        : output_(output), lookup_(output.lookup()), block_(output.lookup()) {
        entries_.factors.resize(kBlock * most_probes);
    }

    // Adds up entries [begin, end), whole rows.
    EMBCOMPRESS_INLINE void reduce_inline(const StoreGradient& gradient, int64_t begin, int64_t end,
                                          Destination& destination) {
        float* target = nullptr;
        int64_t row = -1;
        bool start = false;
        for (int64_t at = begin; at < end; at += entries_.count) {
            load(gradient, at, end, &destination);
            for (int i = 0; i < entries_.count;) {
                const int last = end_of_run(gradient, i);
                if (entries_.rows[i] != row) {
                    if (target != nullptr) destination.finish(target);
                    row = entries_.rows[i];
                    target = destination.start(row);
                    start = destination.starts_from_nothing();
                }
                pool_run(gradient.sources[entries_.sources[i]], i, last, start, target);
                start = false;
                i = last;
            }
        }
        if (target != nullptr) destination.finish(target);
    }

    // Adds up entries [begin, end) of one row.
    EMBCOMPRESS_INLINE void add_inline(const StoreGradient& gradient, int64_t begin, int64_t end,
                                       float* target) {
        for (int64_t at = begin; at < end; at += entries_.count) {
            load(gradient, at, end, nullptr);
            for (int i = 0; i < entries_.count;) {
                const int last = end_of_run(gradient, i);
                pool_run(gradient.sources[entries_.sources[i]], i, last, false, target);
                i = last;
            }
        }
    }

    // Adds ids [begin, end) of the source's feature, in the order of the batch, to the rows that
    // they touch. False for an id outside the vocabulary.
    EMBCOMPRESS_INLINE bool add_batch_inline(const StoreGradient& gradient, const Source& source,
                                             int64_t begin, int64_t end, float* sums,
                                             uint8_t* touched) {
        bool valid = true;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int n = static_cast<int>(std::min<int64_t>(kBlock, end - at));
            int64_t rows[kBlock];
            block_.use(*source.feature);
            valid &= touched_rows(lookup_, source.use, source.first + at, n, block_, rows);
            int count = 0;
            for (int i = 0; i < n; ++i) {
                if (rows[i] < 0) continue;
                entries_.rows[count] = rows[i];
                entries_.positions[count++] = source.first + at + i;
            }
            entries_.count = count;
            for (int i = 0; i < count; ++i) load_entry(source, i);
            if (source.is_product) load_factors(source);
            for (int i = 0; i < count; ++i) {
                std::fill_n(touched + entries_.rows[i], source.pieces, uint8_t{1});
                pool_run(source, i, i + 1, false, sums + entries_.rows[i] * gradient.width());
            }
        }
        return valid;
    }

  private:
    // Entries of one row and one use.
    EMBCOMPRESS_INLINE int end_of_run(const StoreGradient& gradient, int begin) const {
        int end = begin + 1;
        const bool alike = gradient.sources.size() == 1;
        while (end < entries_.count && entries_.rows[end] == entries_.rows[begin] &&
               (alike || entries_.sources[end] == entries_.sources[begin])) {
            ++end;
        }
        return end;
    }

    // Loads entries from `begin` on: a block, or fewer where the uses of a product change.
    EMBCOMPRESS_INLINE void load(const StoreGradient& gradient, int64_t begin, int64_t end,
                                 const Destination* destination) {
        const int most = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
        int count = 0;
        for (; count < most; ++count) {
            const int64_t row = gradient.sorted.row(begin + count);
            const int32_t use = static_cast<int32_t>(gradient.sorted.use(begin + count));
            if (gradient.has_products && count > 0 && use != entries_.sources[0]) break;
            const Source& source = gradient.sources[use];
            entries_.rows[count] = row;
            entries_.sources[count] = use;
            entries_.positions[count] = source.first + gradient.sorted.position(begin + count);
            output_.prefetch_sample(entries_.positions[count]);
            const bool is_new = count == 0 || row != entries_.rows[count - 1];
            if (destination != nullptr && is_new) destination->prefetch(row);
        }
        entries_.count = count;
        for (int i = 0; i < count; ++i) load_entry(gradient.sources[entries_.sources[i]], i);
        const Source& source = gradient.sources[entries_.sources[0]];
        if (source.is_product) load_factors(source);
    }

    EMBCOMPRESS_INLINE void load_entry(const Source& source, int i) {
        const int64_t position = entries_.positions[i];
        if (source.use.role != Role::kRows) {
            entries_.factors[i] = source.added.data() + (position - source.first) * source.width;
            entries_.coefficients[i] = 1.0f;
            return;
        }
        const int64_t feature = source.use.feature, sample = output_.sample(feature, position);
        const float* mine =
            output_.of_sample(feature, sample) + source.probe->column + source.first_column;
        for (int64_t c = 0; c < std::min(source.width, kPrefetchFloats); c += 16) {
            __builtin_prefetch(mine + c);
        }
        entries_.factors[i] = mine;
        if (!source.has_coefficients) return;
        float coefficient = output_.coefficient(feature, position, sample);
        if (source.probe->scale.kind != ScaleKind::kNone) {
            coefficient *= scale_of(lookup_, source.probe->scale, lookup_.id(position));
        }
        entries_.coefficients[i] = coefficient;
    }

    // The rows that the entries' rows are multiplied by, and their scales.
    EMBCOMPRESS_INLINE void load_factors(const Source& source) {
        const int count = entries_.count;
        int64_t ids[kBlock];
        for (int i = 0; i < count; ++i) ids[i] = lookup_.id(entries_.positions[i]);
        block_.use(*source.feature);
        block_.set_ids(ids, count);
        const float** factors = entries_.factors.data();
        for (int u = 0; u < block_.num_probes(); ++u) {
            if (u == source.use.probe) continue;
            factors += kBlock;
            block_.find_rows(u, count);
            block_.find_pointers(u, count);
            block_.fetch_rows(u, 0, count);
            for (int i = 0; i < count; ++i) {
                factors[i] = block_.pointers(u)[i] + source.first_column;
            }
            if (!block_.scaled()) continue;
            for (int i = 0; i < count; ++i) entries_.coefficients[i] *= block_.scales(u)[i];
        }
    }

    EMBCOMPRESS_INLINE void pool_run(const Source& source, int begin, int end, bool start,
                                     float* target) const {
        const int factors = source.is_product ? static_cast<int>(source.feature->num_probes) : 1;
        const ProbeRows rows{entries_.factors.data(), nullptr, factors};
        const float* weights = source.has_coefficients ? entries_.coefficients : nullptr;
        pool_probes<true>(rows, {begin, end, weights, start, 0, target + source.column},
                          source.width);
    }

    const OutputGradient& output_;
    const Lookup& lookup_;
    RowBlock block_;
    Entries entries_;
};

}  // namespace embcompress
