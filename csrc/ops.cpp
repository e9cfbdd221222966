// The operators embcompress::* on the CPU, through torch's stable ABI: allocation, kernels,
// results.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/gradients.h"
#include "cpu/hot_sketch.h"

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

const float* floats(const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// An uninitialized tensor of one or two dimensions. torch::stable::empty looks its operator up by
// its name in every call, which takes longer than all else that a call allocates.
Tensor empty(int32_t dtype, int64_t rows, std::optional<int64_t> columns = std::nullopt) {
    const int64_t sizes[] = {rows, columns.value_or(1)}, strides[] = {columns.value_or(1), 1};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(columns.has_value() ? 2 : 1, sizes, strides,
                                                    dtype, aoti_torch_device_type_cpu(), 0,
                                                    &handle));
    return Tensor(handle);
}

Tensor empty_floats(int64_t rows, std::optional<int64_t> columns = std::nullopt) {
    return empty(aoti_torch_dtype_float32(), rows, columns);
}

// Room for the touched rows of a wanted store and their gradients.
struct Touched {
    std::unique_ptr<int64_t[]> rows;
    std::unique_ptr<float[]> values;

    Touched(int64_t count, int64_t width)
        : rows(new int64_t[count]), values(new float[count * width]) {}

    GradientSink sink() { return {nullptr, rows.get(), values.get(), nullptr}; }
};

// ------------------------------------------------------------------------------------ operators

Tensor lookup(std::vector<Tensor> stores, Tensor ids, std::optional<Tensor> offsets,
              std::optional<Tensor> weights, Tensor encoding, bool ends_are_given,
              int64_t num_features, int64_t num_columns, bool /*sparse: for the backward*/) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    STD_TORCH_CHECK(
        num_features == what.header.num_features && num_columns == what.header.num_columns,
        "num_features and num_columns are not the encoding's");
    Tensor out = empty_floats(what.batch, num_columns);
    check_ids(lookup_forward(what, mutable_floats(out), threads()));
    return out;
}

std::vector<Tensor> lookup_backward(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                                    std::optional<Tensor> offsets, std::optional<Tensor> weights,
                                    Tensor encoding, bool ends_are_given,
                                    std::vector<int64_t> wanted) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, ids, what);
    check_wanted(what, wanted);
    StoreGradients gradients(what, floats(gradient), wanted, Touches::kUncounted, threads());
    check_ids(gradients.prepare());
    std::vector<Tensor> results;
    std::vector<GradientSink> sinks;
    for (const int64_t store : wanted) {
        const StoreView& view = what.stores[store];
        Tensor dense = empty_floats(view.rows, view.width);
        torch::stable::zero_(dense);
        sinks.push_back({mutable_floats(dense), nullptr, nullptr, nullptr});
        results.push_back(dense);
    }
    gradients.reduce(sinks);
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
    StoreGradients gradients(what, floats(gradient), wanted, Touches::kCounted, threads());
    check_ids(gradients.prepare());
    std::vector<Tensor> results;
    std::vector<GradientSink> sinks;
    for (size_t k = 0; k < wanted.size(); ++k) {
        Tensor rows = empty(aoti_torch_dtype_int64(), gradients.num_touched(k));
        Tensor values = empty_floats(gradients.num_touched(k), what.stores[wanted[k]].width);
        sinks.push_back({nullptr, static_cast<int64_t*>(rows.mutable_data_ptr()),
                         mutable_floats(values), nullptr});
        results.push_back(rows);
        results.push_back(values);
    }
    gradients.reduce(sinks);
    return results;
}

Tensor lookup_backward_weights(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                               std::optional<Tensor> offsets, std::optional<Tensor> weights,
                               Tensor encoding, bool ends_are_given) {
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, ids, what);
    Tensor out = empty_floats(what.num_ids);
    check_ids(weights_gradient(what, static_cast<const float*>(gradient.const_data_ptr()),
                               static_cast<float*>(out.mutable_data_ptr()), threads()));
    return out;
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

// How a wanted store is updated, from state that is checked.
Updated read_updated(const Lookup& what, const Optimizer& optimizer, Tensor& store, int64_t number,
                     size_t k, std::vector<Tensor>& first, std::vector<Tensor>& second,
                     const std::vector<Tensor>& steps) {
    Updated updated{optimizer, what.stores[number].width, mutable_floats(store), nullptr, nullptr};
    if (has_first(optimizer.kind)) updated.first = mutable_floats(first[k]);
    if (has_second(optimizer.kind)) updated.second = mutable_floats(second[k]);
    updated.optimizer.step = *static_cast<const int64_t*>(steps[k].const_data_ptr()) + 1;
    return updated;
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
    check_wanted(what, wanted);
    const Optimizer optimizer = read_optimizer(settings, kind);
    check_states(optimizer, what, ids, wanted, first, second, steps);
    std::vector<Updated> updated;
    for (size_t k = 0; k < wanted.size(); ++k) {
        updated.push_back(
            read_updated(what, optimizer, stores[wanted[k]], wanted[k], k, first, second, steps));
    }
    StoreGradients gradients(what, floats(gradient), wanted, Touches::kUncounted, threads());
    check_ids(gradients.prepare());
    // Rows that other gradients are read from must not move before those are complete.
    std::vector<GradientSink> sinks;
    std::vector<std::pair<size_t, Touched>> later;
    for (size_t k = 0; k < wanted.size(); ++k) {
        if (gradients.may_update(k)) {
            sinks.push_back({nullptr, nullptr, nullptr, &updated[k]});
        } else {
            later.emplace_back(k, Touched(gradients.num_touched(k), updated[k].width));
            sinks.push_back(later.back().second.sink());
        }
    }
    gradients.reduce(sinks);
    for (auto& [k, touched] : later) {
        update_rows(updated[k], touched.rows.get(), touched.values.get(), gradients.num_touched(k),
                    threads());
    }
    for (size_t k = 0; k < wanted.size(); ++k) {
        *static_cast<int64_t*>(steps[k].mutable_data_ptr()) = updated[k].optimizer.step;
    }
}

void check_contiguous(const Tensor& tensor, ScalarType type, int64_t dims, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type &&
                        tensor.dim() == dims,
                    name, " must be a contiguous ", dims, "-D CPU tensor of int64 ids or float32");
}

void hot_sketch_add(Tensor ids, Tensor amounts, Tensor slot_ids, Tensor scores, int64_t key,
                    int64_t kept) {
    check_contiguous(ids, ScalarType::Long, 1, "ids");
    check_contiguous(amounts, ScalarType::Float, 1, "amounts");
    check_contiguous(slot_ids, ScalarType::Long, 2, "slot_ids");
    check_contiguous(scores, ScalarType::Float, 2, "scores");
    const int64_t buckets = slot_ids.size(0), width = slot_ids.size(1);
    STD_TORCH_CHECK(amounts.numel() == ids.numel() && scores.size(0) == buckets &&
                        scores.size(1) == width && buckets >= 1 && kept >= 0 && kept < width,
                    "hot_sketch_add: ", ids.numel(), " ids, ", amounts.numel(), " amounts, ",
                    buckets, " x ", width, " slots, of which ", kept, " are kept");
    const HotSketch sketch{static_cast<int64_t*>(slot_ids.mutable_data_ptr()),
                           mutable_floats(scores),
                           buckets,
                           width,
                           kept,
                           static_cast<uint64_t>(key)};
    add_to_sketch(sketch, static_cast<const int64_t*>(ids.const_data_ptr()), floats(amounts),
                  ids.numel());
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
    m.impl("hot_sketch_add", TORCH_BOX(&embcompress::hot_sketch_add));
}
