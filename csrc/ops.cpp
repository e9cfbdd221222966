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

// ------------------------------------------------------------------------------------ operators

Tensor lookup(std::vector<Tensor> stores, Tensor ids, std::optional<Tensor> offsets,
              std::optional<Tensor> weights, Tensor encoding, bool ends_are_given,
              int64_t num_features, int64_t num_columns, bool /*sparse: for the backward*/) {
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
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
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, what);
    std::vector<Tensor> results;
    std::vector<GradientSink> sinks(stores.size());
    std::vector<GradientSink*> pointers(stores.size(), nullptr);
    for (const int64_t store : wanted) {
        const StoreView& view = wanted_store(what, pointers, store);
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
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, what);
    std::vector<GradientSink> sinks(stores.size());
    std::vector<GradientSink*> pointers(stores.size(), nullptr);
    for (const int64_t store : wanted) {
        sinks[store].width = wanted_store(what, pointers, store).width;
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
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, what);
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
    const bool rowwise = store.optimizer.kind == OptimizerKind::kRowwiseAdagrad;
    for (size_t i = 0; i < touched.rows().size(); ++i) {
        const int64_t row = touched.rows()[i], at = row * (rowwise ? 1 : store.width);
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
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, what);
    const Optimizer optimizer = read_optimizer(settings, kind);
    const bool rowwise = optimizer.kind == OptimizerKind::kRowwiseAdagrad;
    const bool has_first = optimizer.kind != OptimizerKind::kSgd;
    const bool has_second = optimizer.kind == OptimizerKind::kAdam;
    std::vector<GradientSink> sinks(stores.size());
    std::vector<GradientSink*> pointers(stores.size(), nullptr);
    for (size_t k = 0; k < wanted.size(); ++k) {
        const StoreView& view = wanted_store(what, pointers, wanted[k]);
        STD_TORCH_CHECK(view.dtype == Dtype::kFloat32, "fused updates need float32 stores");
        const int64_t numbers = view.rows * (rowwise ? 1 : view.width);
        if (has_first) check_state(first, k, ScalarType::Float, numbers);
        if (has_second) check_state(second, k, ScalarType::Float, numbers);
        check_state(steps, k, ScalarType::Long, 1);
        STD_TORCH_CHECK(*static_cast<const int64_t*>(steps[k].const_data_ptr()) >= 0,
                        "a negative number of steps");
        sinks[wanted[k]].width = view.width;
        pointers[wanted[k]] = &sinks[wanted[k]];
    }
    // All gradients are complete before any row moves: a product reads the other stores' rows.
    check_ids(accumulate_gradients(what, static_cast<const float*>(gradient.const_data_ptr()),
                                   pointers, threads()));
    std::vector<Updated> updates;
    for (size_t k = 0; k < wanted.size(); ++k) {
        Updated update{optimizer, what.stores[wanted[k]].width, nullptr, nullptr, nullptr};
        update.optimizer.step = ++*static_cast<int64_t*>(steps[k].mutable_data_ptr());
        update.data = static_cast<float*>(stores[wanted[k]].mutable_data_ptr());
        if (has_first) update.first = static_cast<float*>(first[k].mutable_data_ptr());
        if (has_second) update.second = static_cast<float*>(second[k].mutable_data_ptr());
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
