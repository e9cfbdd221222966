// What adds up the gradients of rows: from sorted entries to the rows they touch, and from ids in
// the order of the batch to small stores.

#pragma once

#include <algorithm>
#include <vector>

#include "gradients.h"
#include "store_gradient.h"

namespace embcompress {

// Gradients of latents go straight through, inside the codes' range, or where a mask keeps them.
// `steps` has room for steps and biases of a row.
EMBCOMPRESS_INLINE void mask_row(const Lookup& lookup, const StoreGradient& gradient, int64_t row,
                                 float* steps, float* values) {
    if (gradient.latents == nullptr) return;
    const Probe& probe = *gradient.latents;
    if (is_sparse(probe)) return clear_pruned(lookup, probe, row, values);
    if (probe.quantization.per_row) load_steps(lookup, probe, row, steps);
    for (int64_t c = 0; c < gradient.width(); c += kUnpacked) {
        const auto inside = latents_at(lookup, probe, row, c, steps).inside;
        const int64_t end = std::min(kUnpacked, gradient.width() - c);
        for (int64_t k = 0; k < end; ++k) values[c + k] = inside[k] ? values[c + k] : 0.0f;
    }
}

// Room for the steps of the latents of a store; the steps, where all rows have the same.
inline std::vector<float> steps_of(const Lookup& lookup, const StoreGradient& gradient) {
    if (gradient.latents == nullptr || is_sparse(*gradient.latents)) return {};
    std::vector<float> steps(2 * steps_room(gradient.latents->width), 0.0f);
    if (!gradient.latents->quantization.per_row) {
        load_steps(lookup, *gradient.latents, 0, steps.data());
    }
    return steps;
}

// Where the gradients of the rows of a task go, one after another.
class Destination {
  public:
    Destination(const Lookup& lookup, const StoreGradient& gradient, const GradientSink& sink,
                int64_t first_row)
        : lookup_(lookup),
          gradient_(gradient),
          sink_(sink),
          next_(first_row),
          steps_(steps_of(lookup, gradient)) {
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
        mask_row(lookup_, gradient_, row_, steps_.data(), target);
        if (sink_.updated != nullptr) sink_.updated->update(row_, target);
    }

  private:
    const Lookup& lookup_;
    const StoreGradient& gradient_;
    const GradientSink& sink_;
    int64_t next_;
    int64_t row_ = 0;
    std::vector<float> steps_;
    std::vector<float> own_;
};

// What the entries read and write is fetched so many entries ahead.
constexpr int kEntriesAhead = 16;

// Some entries: what each adds to its row, as factors of a product, and the number before it.
struct Entries {
    int count;
    int64_t rows[kBlock];
    int32_t sources[kBlock];
    int64_t positions[kBlock];
    float coefficients[kBlock];
    std::vector<const float*> factors;  // kBlock of each
    std::vector<int64_t> lines;         // of each, that are fetched
    const int64_t* factor_rows;         // of the last factor
    int num_factors;
    int fetched;
};

class Reducer {
  public:
    Reducer(const OutputGradient& output, int64_t most_probes)
        : output_(output), lookup_(output.lookup()), block_(output.lookup()) {
        entries_.factors.resize(kBlock * most_probes);
        entries_.lines.resize(most_probes);
    }

    // Adds up entries [begin, end), whole rows. What they add to other factors goes to `joint`, by
    // the number of the source.
    template <int kLanes>
    EMBCOMPRESS_INLINE void reduce(const StoreGradient& gradient, int64_t begin, int64_t end,
                                   Destination& destination, Sums* joint) {
        float* target = nullptr;
        int64_t row = -1;
        bool start = false;
        for (int64_t at = begin; at < end; at += entries_.count) {
            load(gradient, at, end);
            for (int i = 0; i < entries_.count;) {
                const int last = end_of_run(gradient, i);
                fetch(last + kEntriesAhead, &destination);
                if (entries_.rows[i] != row) {
                    if (target != nullptr) destination.finish(target);
                    row = entries_.rows[i];
                    target = destination.start(row);
                    start = destination.starts_from_nothing();
                }
                const int32_t use = entries_.sources[i];
                pool_run<kLanes>(gradient.sources[use], i, last, start, target);
                add_joint<kLanes>(gradient, use, i, last, joint);
                start = false;
                i = last;
            }
        }
        if (target != nullptr) destination.finish(target);
    }

    // Adds up entries [begin, end) of one row.
    template <int kLanes>
    EMBCOMPRESS_INLINE void add(const StoreGradient& gradient, int64_t begin, int64_t end,
                                float* target, Sums* joint) {
        for (int64_t at = begin; at < end; at += entries_.count) {
            load(gradient, at, end);
            for (int i = 0; i < entries_.count;) {
                const int last = end_of_run(gradient, i);
                fetch(last + kEntriesAhead, nullptr);
                const int32_t use = entries_.sources[i];
                pool_run<kLanes>(gradient.sources[use], i, last, false, target);
                add_joint<kLanes>(gradient, use, i, last, joint);
                i = last;
            }
        }
    }

    // Adds ids [begin, end) of the source's feature, in the order of the batch, to the rows that
    // they touch. False for an id outside the vocabulary.
    template <int kLanes>
    EMBCOMPRESS_INLINE bool add_batch(const StoreGradient& gradient, const Source& source,
                                      int64_t begin, int64_t end, float* sums, uint8_t* touched) {
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
            load_factors(source);
            for (int i = 0; i < count; ++i) {
                fetch(i + kEntriesAhead, nullptr);
                std::fill_n(touched + entries_.rows[i], source.pieces, uint8_t{1});
                pool_run<kLanes>(source, i, i + 1, false,
                                 sums + entries_.rows[i] * gradient.width());
            }
        }
        return valid;
    }

  private:
    // Entries of one row and one use; few enough to be fetched ahead of their use.
    EMBCOMPRESS_INLINE int end_of_run(const StoreGradient& gradient, int begin) const {
        int end = begin + 1;
        const bool alike = gradient.sources.size() == 1;
        const int last = std::min(begin + kEntriesAhead, entries_.count);
        while (end < last && entries_.rows[end] == entries_.rows[begin] &&
               (alike || entries_.sources[end] == entries_.sources[begin])) {
            ++end;
        }
        return end;
    }

    // Loads entries from `begin` on: a block, or fewer where the uses of a product change.
    EMBCOMPRESS_INLINE void load(const StoreGradient& gradient, int64_t begin, int64_t end) {
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
        }
        entries_.count = count;
        for (int i = 0; i < count; ++i) load_entry(gradient.sources[entries_.sources[i]], i);
        load_factors(gradient.sources[entries_.sources[0]]);
    }

    // Prefetches what the entries before `end` read and write, each once.
    EMBCOMPRESS_INLINE void fetch(int end, const Destination* destination) {
        end = std::min(end, entries_.count);
        for (int i = entries_.fetched; i < end; ++i) {
            for (int k = 0; k < entries_.num_factors; ++k) {
                const float* factor = entries_.factors[k * kBlock + i];
                for (int64_t line = 0; line < entries_.lines[k]; ++line) {
                    __builtin_prefetch(factor + line * kLineFloats);
                }
            }
            const bool is_new = i == 0 || entries_.rows[i] != entries_.rows[i - 1];
            if (destination != nullptr && is_new) destination->prefetch(entries_.rows[i]);
        }
        entries_.fetched = std::max(entries_.fetched, end);
    }

    EMBCOMPRESS_INLINE void load_entry(const Source& source, int i) {
        const int64_t position = entries_.positions[i];
        if (source.use.role != Role::kRows) {
            entries_.factors[i] = source.added.data() + (position - source.first) * source.width;
            entries_.coefficients[i] = 1.0f;
            return;
        }
        const int64_t feature = source.use.feature, sample = output_.sample(feature, position);
        entries_.factors[i] =
            output_.of_sample(feature, sample) + source.probe->column + source.first_column;
        if (!source.has_coefficients) return;
        float coefficient = output_.coefficient(feature, position, sample);
        if (source.probe->scale.kind != ScaleKind::kNone) {
            coefficient *= scale_of(lookup_, source.probe->scale, lookup_.id(position));
        }
        entries_.coefficients[i] = coefficient;
    }

    // The rows that the entries' rows are multiplied by, where there are any, and their scales.
    EMBCOMPRESS_INLINE void load_factors(const Source& source) {
        entries_.fetched = 0;
        entries_.num_factors = 1;
        entries_.lines[0] =
            (std::min(source.width, kPrefetchFloats) + kLineFloats - 1) / kLineFloats;
        if (!source.is_product) return;
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
            entries_.lines[entries_.num_factors++] = block_.fetched_lines(u);
            for (int i = 0; i < count; ++i) {
                factors[i] = block_.pointers(u)[i] + source.first_column;
            }
            entries_.factor_rows = block_.rows(u);
            if (!block_.scaled()) continue;
            for (int i = 0; i < count; ++i) entries_.coefficients[i] *= block_.scales(u)[i];
        }
    }

    template <int kLanes>
    EMBCOMPRESS_INLINE void pool_run(const Source& source, int begin, int end, bool start,
                                     float* target) const {
        const int factors = source.is_product ? static_cast<int>(source.feature->num_probes) : 1;
        const ProbeRows rows{entries_.factors.data(), nullptr, factors};
        const float* weights = source.has_coefficients ? entries_.coefficients : nullptr;
        pool_probes<kLanes, true>(rows, {begin, end, weights, start, 0, target + source.column},
                                  source.width);
    }

    // Adds what entries of one row and one use, of a product of two, add to the other factor.
    template <int kLanes>
    EMBCOMPRESS_INLINE void add_joint(const StoreGradient& gradient, int32_t use, int begin,
                                      int end, Sums* joint) const {
        const Source& source = gradient.sources[use];
        if (source.joint == nullptr) return;
        const int64_t width = gradient.width();
        const float* row =
            static_cast<const float*>(gradient.store.data) + entries_.rows[begin] * width;
        const float* weights = source.has_coefficients ? entries_.coefficients : nullptr;
        const float* factors[2 * kBlock];
        for (int i = begin; i < end; ++i) {
            const int64_t other = entries_.factor_rows[i];
            factors[i] = entries_.factors[i];
            factors[kBlock + i] = row;
            joint[use].touched[other] = 1;
            pool_probes<kLanes, true>(
                {factors, nullptr, 2},
                {i, i + 1, weights, false, 0, joint[use].values.data() + other * width}, width);
        }
    }

    const OutputGradient& output_;
    const Lookup& lookup_;
    RowBlock block_;
    Entries entries_;
};

}  // namespace embcompress
