// What adds up the gradients of rows: from groups of entries to the rows they touch, and from ids
// in the order of the batch to small stores.

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

// Where the gradients of the touched rows of a group go.
class Destination {
  public:
    // `room` is where gradients of rows that are updated are added up.
    Destination(const Lookup& lookup, const StoreGradient& gradient, const GradientSink& sink,
                LineFloats& room)
        : lookup_(lookup),
          gradient_(gradient),
          sink_(sink),
          room_(room),
          width_(gradient.width()),
          steps_(steps_of(lookup, gradient)) {}

    // Turns to some rows, whose gradients are then zero, or what is there already. `first` is the
    // number of the first one among all touched rows.
    EMBCOMPRESS_INLINE void start(const int64_t* rows, int64_t count, int64_t first) {
        rows_ = rows;
        count_ = count;
        if (sink_.dense != nullptr) return;
        if (sink_.rows == nullptr) {
            room_.assign(count * width_, 0.0f);
            sums_ = room_.data();
            prefetch(0, kRowsAhead);
            return;
        }
        std::copy(rows, rows + count, sink_.rows + first);
        sums_ = sink_.values + first * width_;
        std::fill(sums_, sums_ + count * width_, 0.0f);
    }

    // The gradient of row number k of them.
    EMBCOMPRESS_INLINE float* sums(int64_t k) const {
        return sink_.dense != nullptr ? sink_.dense + rows_[k] * width_ : sums_ + k * width_;
    }

    // When all is added up.
    EMBCOMPRESS_INLINE void finish() {
        if (sink_.updated == nullptr && gradient_.latents == nullptr) return;
        for (int64_t k = 0; k < count_; ++k) {
            prefetch(k + kRowsAhead, k + kRowsAhead + 1);
            mask_row(lookup_, gradient_, rows_[k], steps_.data(), sums(k));
            if (sink_.updated != nullptr) sink_.updated->update(rows_[k], sums(k));
        }
    }

  private:
    // Of rows that are updated.
    EMBCOMPRESS_INLINE void prefetch(int64_t begin, int64_t end) const {
        end = std::min(end, count_);
        for (int64_t k = begin; k < end && sink_.updated != nullptr; ++k) {
            sink_.updated->prefetch(rows_[k]);
        }
    }

    const Lookup& lookup_;
    const StoreGradient& gradient_;
    const GradientSink& sink_;
    LineFloats& room_;
    const int64_t width_;
    const int64_t* rows_ = nullptr;
    int64_t count_ = 0;
    float* sums_ = nullptr;
    std::vector<float> steps_;
};

// What the entries read is fetched so many entries ahead.
constexpr int kEntriesAhead = 16;

// Some entries of one source: what each adds to its row, as factors of a product, and the number
// before it. The factors of a product of two whose joint is added up along are the other row, the
// gradient, and its own row: the first two are its own row's gradient, the last two the joint's.
struct Entries {
    int count;
    int64_t rows[kBlock];
    int64_t positions[kBlock];
    float coefficients[kBlock];
    float* sums[kBlock];                // where each is added
    float* joint_sums[kBlock];          // what it adds to the joint
    std::vector<const float*> factors;  // kBlock of each
    std::vector<int64_t> lines;         // of each, that are fetched
    const int64_t* other_rows;          // of the last other factor
    int num_factors;
    int fetched;
};

class Reducer {
  public:
    Reducer(const OutputGradient& output, int64_t most_probes)
        : output_(output), lookup_(output.lookup()), block_(output.lookup()) {
        entries_.factors.resize(kBlock * (most_probes + 1));
        entries_.lines.resize(most_probes + 1);
    }

    // Adds up the entries of a group. What they add to other factors goes to `joint`, by the number
    // of the source.
    template <int kLanes>
    EMBCOMPRESS_INLINE void reduce(const StoreGradient& gradient, const GroupedRows::Group& group,
                                   Destination& destination, Sums* joint) {
        if (static_cast<int64_t>(rows_.size()) < group.most_touched()) {
            rows_.resize(group.most_touched());
        }
        const int64_t count = gradient.grouped.number_rows(
            group, numbers_, [&](int64_t number, int64_t row) { rows_[number] = row; });
        destination.start(rows_.data(), count, group.first_touched);
        for (int64_t at = group.begin; at < group.end; at += entries_.count) {
            const int64_t use = load(gradient, at, group.end);
            const Source& source = gradient.sources[use];
            for (int i = 0; i < entries_.count; ++i) {
                const int64_t number = numbers_.number(entries_.rows[i] - group.first_row);
                entries_.sums[i] = destination.sums(number) + source.column;
            }
            if (source.joint != nullptr) find_joint_sums(joint[use], source.width);
            for_each_run([&](int first, int last) EMBCOMPRESS_INLINED {
                pool<kLanes>(source, each_to(entries_.sums, source, first, last));
                if (source.joint != nullptr) add_joint<kLanes>(source, first, last);
            });
        }
        numbers_.clear(group.num_rows());
        destination.finish();
    }

    // Adds up entries [begin, end) of one row.
    template <int kLanes>
    EMBCOMPRESS_INLINE void add(const StoreGradient& gradient, int64_t begin, int64_t end,
                                float* sums, Sums* joint) {
        for (int64_t at = begin; at < end; at += entries_.count) {
            const int64_t use = load(gradient, at, end);
            const Source& source = gradient.sources[use];
            if (source.joint != nullptr) find_joint_sums(joint[use], source.width);
            for_each_run([&](int first, int last) EMBCOMPRESS_INLINED {
                pool<kLanes>(source,
                             {first, last, weights(source), false, 0, sums + source.column});
                if (source.joint != nullptr) add_joint<kLanes>(source, first, last);
            });
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
            load_factors(source);
            for (int i = 0; i < count; ++i) {
                std::fill_n(touched + entries_.rows[i], source.pieces, uint8_t{1});
                entries_.sums[i] = sums + entries_.rows[i] * gradient.width() + source.column;
            }
            for_each_run([&](int first, int last) EMBCOMPRESS_INLINED {
                // Rows of several pieces overlap, and columns are added up a vector at a time: one
                // row after another keeps the order of the batch for any width of vectors.
                const int step = source.pieces == 1 ? last - first : 1;
                for (int i = first; i < last; i += step) {
                    pool<kLanes>(source, each_to(entries_.sums, source, i, i + step));
                }
            });
        }
        return valid;
    }

    // Room for the gradients of a destination.
    LineFloats& room() { return room_; }

  private:
    // Loads entries from `begin` on: a block, or fewer where the use changes, whose number it is.
    EMBCOMPRESS_INLINE int64_t load(const StoreGradient& gradient, int64_t begin, int64_t end) {
        const GroupedRows& grouped = gradient.grouped;
        const int most = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
        const int64_t use = grouped.use(begin);
        int count = 1;
        if (gradient.sources.size() == 1) {
            count = most;
        } else {
            while (count < most && grouped.use(begin + count) == use) ++count;
        }
        const int64_t first = gradient.sources[use].first;
        for (int i = 0; i < count; ++i) {
            entries_.rows[i] = grouped.row(begin + i);
            entries_.positions[i] = first + grouped.position(begin + i);
        }
        entries_.count = count;
        load_factors(gradient.sources[use]);
        return use;
    }

    // Calls f(first, last) for a few entries at a time, while the next ones are fetched.
    template <typename F>
    EMBCOMPRESS_INLINE void for_each_run(const F& f) {
        for (int first = 0; first < entries_.count; first += kEntriesAhead) {
            const int last = std::min(first + kEntriesAhead, entries_.count);
            fetch(last + kEntriesAhead);
            f(first, last);
        }
    }

    // Prefetches what the entries before `end` read, each once.
    EMBCOMPRESS_INLINE void fetch(int end) {
        end = std::min(end, entries_.count);
        for (int i = entries_.fetched; i < end; ++i) {
            for (int k = 0; k < entries_.num_factors; ++k) {
                const float* factor = entries_.factors[k * kBlock + i];
                for (int64_t line = 0; line < entries_.lines[k]; ++line) {
                    __builtin_prefetch(factor + line * kLineFloats);
                }
            }
        }
        entries_.fetched = std::max(entries_.fetched, end);
    }

    // What the entries add, and what it is multiplied by.
    EMBCOMPRESS_INLINE void load_factors(const Source& source) {
        entries_.fetched = 0;
        entries_.num_factors = 0;
        const int64_t lines =
            (std::min(source.width, kPrefetchFloats) + kLineFloats - 1) / kLineFloats;
        if (source.use.role != Role::kRows) return load_added(source, factor(0, lines));
        const int gradients = source.joint == nullptr ? 0 : 1;
        load_gradients(source, factor(gradients, lines));
        if (source.is_product) load_other_factors(source, 1 - gradients);
        if (source.joint != nullptr) load_own_rows(source, factor(2, lines));
    }

    // Room for the pointers of factor number k, of which so many lines are fetched.
    EMBCOMPRESS_INLINE const float** factor(int k, int64_t lines) {
        entries_.lines[k] = lines;
        entries_.num_factors = std::max(entries_.num_factors, k + 1);
        return entries_.factors.data() + k * kBlock;
    }

    // Of uses that are no rows: what each id adds is there.
    EMBCOMPRESS_INLINE void load_added(const Source& source, const float** added) {
        for (int i = 0; i < entries_.count; ++i) {
            const int64_t id = entries_.positions[i] - source.first;
            added[i] = source.added.data() + id * source.width;
        }
    }

    // The gradients of the entries' samples, and their coefficients, where there are any.
    EMBCOMPRESS_INLINE void load_gradients(const Source& source, const float** gradients) {
        const int64_t feature = source.use.feature;
        const int64_t column = source.probe->column + source.first_column;
        int64_t samples[kBlock];
        for (int i = 0; i < entries_.count; ++i) {
            samples[i] = output_.sample(feature, entries_.positions[i]);
            gradients[i] = output_.of_sample(feature, samples[i]) + column;
        }
        if (!source.has_coefficients) return;
        for (int i = 0; i < entries_.count; ++i) {
            const int64_t position = entries_.positions[i];
            float coefficient = output_.coefficient(feature, position, samples[i]);
            if (source.probe->scale.kind != ScaleKind::kNone) {
                coefficient *= scale_of(lookup_, source.probe->scale, lookup_.id(position));
            }
            entries_.coefficients[i] = coefficient;
        }
    }

    // The rows that the entries' rows are multiplied by, as factors from number k on, and their
    // scales.
    EMBCOMPRESS_INLINE void load_other_factors(const Source& source, int k) {
        const int count = entries_.count;
        int64_t ids[kBlock];
        for (int i = 0; i < count; ++i) ids[i] = lookup_.id(entries_.positions[i]);
        block_.use(*source.feature);
        block_.set_ids(ids, count);
        for (int u = 0; u < block_.num_probes(); ++u) {
            if (u == source.use.probe) continue;
            block_.find_rows(u, count);
            block_.find_pointers(u, count);
            const float** others = factor(k++, block_.fetched_lines(u));
            for (int i = 0; i < count; ++i) {
                others[i] = block_.pointers(u)[i] + source.first_column;
            }
            entries_.other_rows = block_.rows(u);
            if (!block_.scaled()) continue;
            for (int i = 0; i < count; ++i) entries_.coefficients[i] *= block_.scales(u)[i];
        }
    }

    // The entries' own rows, which the other factor's gradient is a product of.
    EMBCOMPRESS_INLINE void load_own_rows(const Source& source, const float** own) {
        const StoreView& store = lookup_.stores[source.probe->store];
        for (int i = 0; i < entries_.count; ++i) {
            own[i] = static_cast<const float*>(store.data) + entries_.rows[i] * store.width;
        }
    }

    // Where the entries add to the other factor.
    EMBCOMPRESS_INLINE void find_joint_sums(Sums& joint, int64_t width) {
        for (int i = 0; i < entries_.count; ++i) {
            const int64_t row = entries_.other_rows[i];
            joint.touched[row] = 1;
            entries_.joint_sums[i] = joint.values.data() + row * width;
        }
    }

    const float* weights(const Source& source) const {
        return source.has_coefficients ? entries_.coefficients : nullptr;
    }

    // Entries that are added each to a sum of its own.
    EMBCOMPRESS_INLINE Target each_to(float* const* sums, const Source& source, int begin,
                                      int end) const {
        return {begin, end, weights(source), false, 0, nullptr, false, sums};
    }

    // Adds entries to the gradients of their rows.
    template <int kLanes>
    EMBCOMPRESS_INLINE void pool(const Source& source, const Target& target) const {
        const int factors = source.is_product ? static_cast<int>(source.feature->num_probes) : 1;
        pool_probes<kLanes, true>({entries_.factors.data(), nullptr, factors}, target,
                                  source.width);
    }

    // Adds what entries of a product of two add to the other factor.
    template <int kLanes>
    EMBCOMPRESS_INLINE void add_joint(const Source& source, int begin, int end) const {
        pool_probes<kLanes, true>({entries_.factors.data() + kBlock, nullptr, 2},
                                  each_to(entries_.joint_sums, source, begin, end), source.width);
    }

    const OutputGradient& output_;
    const Lookup& lookup_;
    RowBlock block_;
    Entries entries_;
    RowNumbers numbers_;
    std::vector<int64_t> rows_;  // that are touched, of a group
    LineFloats room_;
};

}  // namespace embcompress
