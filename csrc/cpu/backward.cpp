// Backward: gradients of rows, learned scales and per-sample weights, the same for any number of
// threads: every partition of a store's rows goes over all ids and keeps to its own rows.

#include <cmath>

#include "gradients.h"
#include "rows.h"

namespace embcompress {
namespace {

// Below this many ids a thread costs more than it gives.
constexpr int64_t kIdsPerThread = 512;

// Numbers of the bags of consecutive positions.
class BagCursor {
  public:
    BagCursor(const Lookup& lookup, int64_t bag) : lookup_(lookup), bag_(bag) {}
    EMBCOMPRESS_INLINE int64_t at(int64_t position) {
        while (lookup_.offset(bag_ + 1) <= position) ++bag_;
        return bag_;
    }

  private:
    const Lookup& lookup_;
    int64_t bag_;
};

// What multiplies the output's gradient for each id: per-sample weight and 1 / count of a mean.
class Coefficients {
  public:
    Coefficients(const Lookup& lookup, const Feature& feature)
        : lookup_(lookup), feature_(feature) {}

    EMBCOMPRESS_INLINE float at(int64_t position, int64_t bag) {
        float value = lookup_.weights == nullptr
                          ? 1.0f
                          : load_float(lookup_.weights, lookup_.weights_dtype, position);
        if (feature_.pool == Pool::kMean) value *= reciprocal(bag);
        return value;
    }

  private:
    EMBCOMPRESS_INLINE float reciprocal(int64_t bag) {
        if (bag == bag_) return reciprocal_;
        bag_ = bag;
        int64_t count = 0;
        for (int64_t p = lookup_.offset(bag); p < lookup_.offset(bag + 1); ++p) {
            count += lookup_.id(p) != feature_.padding_idx;
        }
        reciprocal_ = 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
        return reciprocal_;
    }

    const Lookup& lookup_;
    const Feature& feature_;
    int64_t bag_ = -1;
    float reciprocal_ = 0.0f;
};

// What a store is to a probe: its rows, its learned scale, or the step or bias of packed rows.
enum class Role { kRows, kScale, kStep, kBias };

struct Use {
    const Feature* feature;
    int64_t number;  // of the feature
    int probe;
    Role role;
};

// The row of the store that an id touches in this role; -1: none.
EMBCOMPRESS_INLINE int64_t touched_row(const RowBlock& rows, const Use& use, int i) {
    if (use.role == Role::kScale) return rows.scale_row(use.probe, i);
    const int64_t row = rows.rows(use.probe)[i];
    const bool shared = use.role != Role::kRows && !rows.probe(use.probe).quantization.per_row;
    return row >= 0 && shared ? 0 : row;
}

// The ids of a block that belong to a partition, with their gradients.
struct Chosen {
    int count = 0;
    int64_t ids[kBlock];
    const float* gradients[kBlock];
    float coefficients[kBlock];
};

// target += gradient * coefficient * (scale of the probe) * (other rows where probes multiply)
EMBCOMPRESS_INLINE void add_row_gradient(const RowBlock& rows, const Feature& feature, int t, int i,
                                         const float* gradient, float coefficient, float* target) {
    const Probe& probe = rows.probe(t);
    float factor = coefficient;
    if (rows.scaled()) factor *= rows.scales(t)[i];
    if (feature.combine != Combine::kMul) {
        const float* mine = gradient + (feature.combine == Combine::kConcat ? probe.column : 0);
        for (int64_t c = 0; c < probe.width; ++c) target[c] += factor * mine[c];
        return;
    }
    const int count = rows.num_probes();
    if (count == 2 && !rows.scaled()) {
        const float* other = rows.pointers(1 - t)[i];
        for (int64_t c = 0; c < probe.width; ++c) target[c] += factor * gradient[c] * other[c];
        return;
    }
    for (int64_t c = 0; c < probe.width; ++c) {
        float value = factor * gradient[c];
        for (int u = 0; u < count; ++u) {
            if (u != t) value *= rows.scales(u)[i] * rows.pointers(u)[i][c];
        }
        target[c] += value;
    }
}

// Gradient of the scale of probe t: the dot product of the gradient with what it multiplies.
EMBCOMPRESS_INLINE float scale_gradient(const RowBlock& rows, const Feature& feature, int t, int i,
                                        const float* gradient, float coefficient) {
    const Probe& probe = rows.probe(t);
    const float* mine = gradient + (feature.combine == Combine::kConcat ? probe.column : 0);
    float total = 0.0f;
    for (int64_t c = 0; c < probe.width; ++c) {
        float value = mine[c] * rows.pointers(t)[i][c];
        if (feature.combine == Combine::kMul) {
            for (int u = 0; u < rows.num_probes(); ++u) {
                if (u != t) value *= rows.scales(u)[i] * rows.pointers(u)[i][c];
            }
        }
        total += value;
    }
    return coefficient * total;
}

// Gradient of latents from that of the row's values: straight through, inside the codes' range.
EMBCOMPRESS_INLINE void add_latent_gradient(const RowBlock& rows, int t, int i,
                                            const float* of_values, float* target) {
    const int64_t row = rows.rows(t)[i];
    for (int64_t c = 0; c < rows.probe(t).width; ++c) {
        if (rows.latent(t, row, c).inside) target[c] += of_values[c];
    }
}

// Gradient of the step or the bias of packed rows, from the gradient of the row's values.
EMBCOMPRESS_INLINE void add_quantization_gradient(const RowBlock& rows, const Use& use, int i,
                                                  const float* of_values, float* target) {
    const Probe& probe = rows.probe(use.probe);
    const Quantization& q = probe.quantization;
    const float zero = q.bias_store < 0 ? static_cast<float>((1 << q.bits) - 1) / 2 : 0.0f;
    const bool is_latent = rows.is_latent(use.probe);
    const float damping = is_latent ? rows.damping(use.probe) : 1.0f;
    const int64_t row = rows.rows(use.probe)[i];
    for (int64_t c = 0; c < probe.width; ++c) {
        float of_step, of_bias = 1.0f;
        if (is_latent) {
            const Latent latent = rows.latent(use.probe, row, c);
            of_step = latent.code - (latent.inside ? latent.position : zero);
            of_bias = latent.inside ? 0.0f : 1.0f;
        } else {
            of_step = rows.packed_code(use.probe, row, c) - zero;
        }
        const float factor = use.role == Role::kBias ? of_bias : of_step;
        target[q.per_column ? c : 0] += of_values[c] * factor * damping;
    }
}

struct Pass {
    const Lookup& lookup;
    const float* grad;
    int partition;
    int partitions;
};

EMBCOMPRESS_INLINE float* sink_row(GradientSink& sink, int partition, int64_t row) {
    return sink.dense != nullptr ? sink.dense + row * sink.width : sink.touched[partition].at(row);
}

// Adds the ids chosen from one block. `values` has room for one row.
EMBCOMPRESS_INLINE void add_chosen(const Pass& pass, const Use& use, const Chosen& chosen,
                                   RowBlock& rows, GradientSink& sink, std::vector<float>& values) {
    const Feature& feature = *use.feature;
    const int t = use.probe, n = chosen.count;
    rows.set_ids(chosen.ids, n);
    const bool needs_others = feature.combine == Combine::kMul;
    for (int u = 0; u < rows.num_probes(); ++u) {
        if (u != t && !needs_others) continue;
        rows.find_rows(u, n);
        if (u != t || use.role == Role::kScale || rows.scaled()) rows.find_pointers(u, n);
    }
    for (int i = 0; i < n; ++i) {
        const float* gradient = chosen.gradients[i];
        const float coefficient = chosen.coefficients[i];
        float* target = sink_row(sink, pass.partition, touched_row(rows, use, i));
        if (use.role == Role::kRows && !rows.is_latent(t)) {
            add_row_gradient(rows, feature, t, i, gradient, coefficient, target);
        } else if (use.role == Role::kScale) {
            target[rows.probe(t).scale.column] +=
                scale_gradient(rows, feature, t, i, gradient, coefficient);
        } else {
            std::fill(values.begin(), values.end(), 0.0f);
            add_row_gradient(rows, feature, t, i, gradient, coefficient, values.data());
            if (use.role == Role::kRows) {
                add_latent_gradient(rows, t, i, values.data(), target);
            } else {
                add_quantization_gradient(rows, use, i, values.data(), target);
            }
        }
    }
}

// Goes over all ids of a feature and adds those whose row is in the partition.
EMBCOMPRESS_INLINE bool add_use_inline(const Pass& pass, const Use& use, GradientSink& sink) {
    const Lookup& lookup = pass.lookup;
    const Feature& feature = *use.feature;
    const int64_t first_bag = use.number * lookup.batch;
    const int64_t begin = lookup.offset(first_bag), end = lookup.offset(first_bag + lookup.batch);
    RowBlock finder(lookup, feature), rows(lookup, feature);
    BagCursor bags(lookup, first_bag);
    Coefficients coefficients(lookup, feature);
    std::vector<float> values(finder.probe(use.probe).width);
    bool valid = true;
    for (int64_t position = begin; position < end; position += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - position));
        valid &= finder.load_ids(position, n);
        if (use.role != Role::kScale) finder.find_rows(use.probe, n);
        Chosen chosen;
        for (int i = 0; i < n; ++i) {
            const int64_t row = touched_row(finder, use, i);
            if (row < 0 || partition_of(row, pass.partitions) != pass.partition) continue;
            const int64_t bag = bags.at(position + i);
            chosen.ids[chosen.count] = finder.ids()[i];
            chosen.gradients[chosen.count] =
                pass.grad + (bag - first_bag) * lookup.header.num_columns + feature.out_column;
            chosen.coefficients[chosen.count++] = coefficients.at(position + i, bag);
        }
        add_chosen(pass, use, chosen, rows, sink, values);
    }
    return valid;
}

EMBCOMPRESS_CLONES bool add_use(const Pass& pass, const Use& use, GradientSink& sink) {
    return add_use_inline(pass, use, sink);
}

std::vector<Use> uses_of(const Lookup& lookup, int64_t store) {
    std::vector<Use> uses;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        for (int t = 0; t < feature.num_probes; ++t) {
            const Probe& probe = lookup.probes[feature.first_probe + t];
            const Quantization& q = probe.quantization;
            if (probe.store == store) uses.push_back({&feature, f, t, Role::kRows});
            if (probe.scale.kind == ScaleKind::kWeight && probe.scale.store == store) {
                uses.push_back({&feature, f, t, Role::kScale});
            }
            if (q.bits > 0 && q.scale_store == store) {
                uses.push_back({&feature, f, t, Role::kStep});
            }
            if (q.bits > 0 && q.bias_store == store) {
                uses.push_back({&feature, f, t, Role::kBias});
            }
        }
    }
    return uses;
}

// How many rows of a store a batch touches at most.
int64_t touches(const Lookup& lookup, int64_t store, const std::vector<Use>& uses) {
    int64_t count = 0;
    for (const Use& use : uses) {
        const int64_t bag = use.number * lookup.batch;
        count += lookup.offset(bag + lookup.batch) - lookup.offset(bag);
    }
    return std::min(count, lookup.stores[store].rows);
}

// Gradient of the per-sample weights of one feature: its vector times the output's gradient.
EMBCOMPRESS_CLONES bool weights_range(const Lookup& lookup, int64_t number, int64_t begin,
                                      int64_t end, const float* grad, float* out) {
    const Feature& feature = lookup.features[number];
    const int64_t first_bag = number * lookup.batch;
    RowBlock rows(lookup, feature);
    BagCursor bags(lookup, first_bag);
    std::vector<float> vector(feature.width);
    bool valid = true;
    for (int64_t position = begin; position < end; position += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - position));
        valid &= rows.load_ids(position, n);
        rows.find_all(n);
        for (int i = 0; i < n; ++i) {
            const float* gradient =
                grad + (bags.at(position + i) - first_bag) * lookup.header.num_columns +
                feature.out_column;
            float total = 0.0f;
            for (int t = 0; t < rows.num_probes() && !rows.skipped(i); ++t) {
                if (feature.combine == Combine::kMul) {
                    total = t == 0 ? scale_gradient(rows, feature, 0, i, gradient, 1.0f) : total;
                } else {
                    total +=
                        rows.scales(t)[i] * scale_gradient(rows, feature, t, i, gradient, 1.0f);
                }
            }
            if (feature.combine == Combine::kMul && !rows.skipped(i)) total *= rows.scales(0)[i];
            out[position + i] = total;
        }
    }
    return valid;
}

}  // namespace

bool accumulate_gradients(const Lookup& lookup, const float* grad,
                          std::vector<GradientSink*>& sinks, int max_threads) {
    const int num_threads = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(max_threads, lookup.num_ids / kIdsPerThread)));
    struct Task {
        int64_t store;
        int partition;
    };
    std::vector<Task> tasks;
    std::vector<std::vector<Use>> uses(sinks.size());
    for (size_t store = 0; store < sinks.size(); ++store) {
        if (sinks[store] == nullptr) continue;
        uses[store] = uses_of(lookup, static_cast<int64_t>(store));
        for (int p = 0; p < num_threads; ++p) tasks.push_back({static_cast<int64_t>(store), p});
        if (sinks[store]->dense == nullptr) sinks[store]->touched.resize(num_threads);
    }
    std::atomic<bool> valid{true};
    std::atomic<size_t> next{0};
    parallel(num_threads, [&](int) {
        for (size_t number = next++; number < tasks.size(); number = next++) {
            const Task& task = tasks[number];
            GradientSink& sink = *sinks[task.store];
            if (sink.dense == nullptr) {
                // An eighth more: partitions are even only on average.
                const int64_t share = touches(lookup, task.store, uses[task.store]) / num_threads;
                sink.touched[task.partition].start(sink.width, share + share / 8 + 64);
            }
            const Pass pass{lookup, grad, task.partition, num_threads};
            for (const Use& use : uses[task.store]) {
                if (!add_use(pass, use, sink)) valid = false;
            }
        }
    });
    return valid;
}

bool weights_gradient(const Lookup& lookup, const float* grad, float* out, int num_threads) {
    std::atomic<bool> valid{true};
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const int64_t begin = lookup.offset(f * lookup.batch);
        const int64_t end = lookup.offset((f + 1) * lookup.batch);
        parallel(num_threads, [&](int part) {
            const int64_t from = begin + (end - begin) * part / num_threads;
            const int64_t to = begin + (end - begin) * (part + 1) / num_threads;
            if (!weights_range(lookup, f, from, to, grad, out)) valid = false;
        });
    }
    return valid;
}

}  // namespace embcompress
