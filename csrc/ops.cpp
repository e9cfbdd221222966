// The operators embcompress::* on the CPU, through torch's stable ABI: allocation, kernels,
// results.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

namespace embcompress {

void parallel_parts(int parts, void (*f)(int part, void* context), void* context) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) f(static_cast<int>(part), context);
    });
}

namespace {

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void check_offsets(Lookup& lookup) {
    const int64_t bags = lookup.header.num_features * lookup.batch;
    STD_TORCH_CHECK(lookup.offset(0) == 0, "offsets[0] must be 0");
    STD_TORCH_CHECK(lookup.offset(bags) == lookup.num_ids,
                    "the last offset must be the number of ids, ", lookup.num_ids);
    const Lengths lengths = bag_lengths(lookup);
    STD_TORCH_CHECK(bags == 0 || (lengths.shortest >= 0 && lengths.longest <= lookup.num_ids),
                    "offsets must rise from 0 to the number of ids");
    lookup.longest_bag = lengths.longest;
    if (lengths.shortest == 1 && lengths.longest == 1) lookup.offsets = nullptr;
}

Lookup check_lookup(const std::vector<Tensor>& stores, const Tensor& ids,
                    const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                    const Tensor& encoding, bool ends_are_given) {
    Lookup lookup = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    if (offsets.has_value()) check_offsets(lookup);
    return lookup;
}

// ------------------------------------------------------------------------------------ operators

Tensor lookup(std::vector<Tensor> stores, Tensor ids, std::optional<Tensor> offsets,
              std::optional<Tensor> weights, Tensor encoding, bool ends_are_given,
              int64_t num_features, int64_t num_columns, bool /*sparse: for the backward*/) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    STD_TORCH_CHECK(
        num_features == what.header.num_features && num_columns == what.header.num_columns,
        "num_features and num_columns are not the encoding's");
    Tensor out = torch::stable::empty({what.batch, num_columns}, ScalarType::Float);
    check_ids(lookup_forward(what, static_cast<float*>(out.mutable_data_ptr()), threads()));
    return out;
}

std::vector<Tensor> lookup_backward(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                                    std::optional<Tensor> offsets, std::optional<Tensor> weights,
                                    Tensor encoding, bool ends_are_given,
                                    std::vector<int64_t> wanted) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, ids, what);
    check_wanted(what, wanted);
    std::vector<Tensor> results;
    std::vector<GradientSink> sinks(stores.size());
    std::vector<GradientSink*> pointers(stores.size(), nullptr);
    for (const int64_t store : wanted) {
        const StoreView& view = what.stores[store];
        Tensor dense = torch::stable::empty({view.rows, view.width}, ScalarType::Float);
        torch::stable::zero_(dense);
        sinks[store].dense = static_cast<float*>(dense.mutable_data_ptr());
        sinks[store].width = view.width;
        pointers[store] = &sinks[store];
        results.push_back(dense);
    }
    check_ids(accumulate_gradients(what, static_cast<const float*>(gradient.const_data_ptr()),
                                   pointers, threads()));
    return results;
}

// Gradients of the touched rows: for each wanted store its row numbers, rising, and their values.
std::vector<Tensor> lookup_backward_sparse(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                                           std::optional<Tensor> offsets,
                                           std::optional<Tensor> weights, Tensor encoding,
                                           bool ends_are_given, std::vector<int64_t> wanted) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, ids, what);
    check_wanted(what, wanted);
    std::vector<GradientSink> sinks(stores.size());
    std::vector<GradientSink*> pointers(stores.size(), nullptr);
    for (const int64_t store : wanted) {
        sinks[store].width = what.stores[store].width;
        pointers[store] = &sinks[store];
    }
    check_ids(accumulate_gradients(what, static_cast<const float*>(gradient.const_data_ptr()),
                                   pointers, threads()));
    std::vector<Tensor> results;
    for (const int64_t store : wanted) {
        struct Entry {
            int64_t row;
            const float* values;
        };
        std::vector<Entry> entries;
        const int64_t width = sinks[store].width;
        for (const TouchedRows& touched : sinks[store].touched) {
            for (size_t i = 0; i < touched.rows().size(); ++i) {
                entries.push_back({touched.rows()[i], touched.values() + i * width});
            }
        }
        std::sort(entries.begin(), entries.end(),
                  [](const Entry& a, const Entry& b) { return a.row < b.row; });
        const int64_t count = static_cast<int64_t>(entries.size());
        Tensor rows = torch::stable::empty({count}, ScalarType::Long);
        Tensor values = torch::stable::empty({count, width}, ScalarType::Float);
        int64_t* row = static_cast<int64_t*>(rows.mutable_data_ptr());
        float* value = static_cast<float*>(values.mutable_data_ptr());
        for (int64_t i = 0; i < count; ++i) {
            row[i] = entries[i].row;
            std::copy(entries[i].values, entries[i].values + width, value + i * width);
        }
        results.push_back(rows);
        results.push_back(values);
    }
    return results;
}

Tensor lookup_backward_weights(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                               std::optional<Tensor> offsets, std::optional<Tensor> weights,
                               Tensor encoding, bool ends_are_given) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, ids, what);
    Tensor out = torch::stable::empty({what.num_ids}, ScalarType::Float);
    check_ids(weights_gradient(what, static_cast<const float*>(gradient.const_data_ptr()),
                               static_cast<float*>(out.mutable_data_ptr()), threads()));
    return out;
}

struct Updated {
    Optimizer optimizer;
    int64_t width;
    float* data;
    float* first;  // state, or nullptr
    float* second;
};

void update_rows(const TouchedRows& touched, const Updated& store) {
    const int64_t state = state_width(store.optimizer.kind, store.width);
    for (size_t i = 0; i < touched.rows().size(); ++i) {
        const int64_t row = touched.rows()[i], at = row * state;
        update_row(store.optimizer, store.width, touched.values() + i * store.width,
                   store.data + row * store.width,
                   store.first == nullptr ? nullptr : store.first + at,
                   store.second == nullptr ? nullptr : store.second + at);
    }
}

// The same as lookup; its gradient formula updates the wanted stores. `anchor` requires a gradient,
// so that there is a backward pass.
Tensor lookup_fused(Tensor /*anchor*/, std::vector<Tensor> stores, Tensor ids,
                    std::optional<Tensor> offsets, std::optional<Tensor> weights, Tensor encoding,
                    bool ends_are_given, int64_t num_features, int64_t num_columns,
                    std::vector<int64_t> /*wanted*/, std::vector<Tensor> /*first*/,
                    std::vector<Tensor> /*second*/, std::vector<Tensor> /*steps*/,
                    Tensor /*settings*/, int64_t /*kind*/) {
    return lookup(std::move(stores), std::move(ids), std::move(offsets), std::move(weights),
                  std::move(encoding), ends_are_given, num_features, num_columns, false);
}

// The backward pass and the update of the touched rows in one. `first` and `second` are the
// optimizer's state for each wanted store (nothing where it has none), `steps` counts the updates
// of each, `settings` are learning rate, epsilon, weight decay and Adam's betas.
void lookup_backward_update(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                            std::optional<Tensor> offsets, std::optional<Tensor> weights,
                            Tensor encoding, bool ends_are_given, std::vector<int64_t> wanted,
                            std::vector<Tensor> first, std::vector<Tensor> second,
                            std::vector<Tensor> steps, Tensor settings, int64_t kind) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, ids, what);
    const Optimizer optimizer = read_optimizer(settings, kind);
    check_wanted(what, wanted);
    check_states(optimizer, what, ids, wanted, first, second, steps);
    std::vector<GradientSink> sinks(stores.size());
    std::vector<GradientSink*> pointers(stores.size(), nullptr);
    for (const int64_t store : wanted) {
        sinks[store].width = what.stores[store].width;
        pointers[store] = &sinks[store];
    }
    // All gradients are complete before any row moves: a product reads the other stores' rows.
    check_ids(accumulate_gradients(what, static_cast<const float*>(gradient.const_data_ptr()),
                                   pointers, threads()));
    std::vector<Updated> updates;
    for (size_t k = 0; k < wanted.size(); ++k) {
        Updated update{optimizer, what.stores[wanted[k]].width, nullptr, nullptr, nullptr};
        update.optimizer.step = ++*static_cast<int64_t*>(steps[k].mutable_data_ptr());
        update.data = static_cast<float*>(stores[wanted[k]].mutable_data_ptr());
        if (has_first(optimizer.kind))
            update.first = static_cast<float*>(first[k].mutable_data_ptr());
        if (has_second(optimizer.kind))
            update.second = static_cast<float*>(second[k].mutable_data_ptr());
        updates.push_back(update);
    }
    // A row is in the same partition of every store, so tables that share a tensor never update a
    // row at the same time.
    const size_t partitions = wanted.empty() ? 0 : sinks[wanted[0]].touched.size();
    parallel(static_cast<int>(partitions), [&](int partition) {
        for (size_t k = 0; k < wanted.size(); ++k) {
            update_rows(sinks[wanted[k]].touched[partition], updates[k]);
        }
    });
}

}  // namespace
}  // namespace embcompress

STABLE_TORCH_LIBRARY_IMPL(embcompress, CPU, m) {
    m.impl("lookup", TORCH_BOX(&embcompress::lookup));
    m.impl("lookup_forward", TORCH_BOX(&embcompress::lookup));
    m.impl("lookup_backward", TORCH_BOX(&embcompress::lookup_backward));
    m.impl("lookup_backward_sparse", TORCH_BOX(&embcompress::lookup_backward_sparse));
    m.impl("lookup_backward_weights", TORCH_BOX(&embcompress::lookup_backward_weights));
    m.impl("lookup_backward_update", TORCH_BOX(&embcompress::lookup_backward_update));
    m.impl("lookup_fused", TORCH_BOX(&embcompress::lookup_fused));
}
