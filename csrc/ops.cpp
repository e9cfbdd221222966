// The operators embcompress::*, through torch's stable ABI: schemas, checks, allocation.
//
// Everything that comes from Python is checked here, at every call: a wrong encoding, store or
// offset is an error, never a read out of bounds.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/gradients.h"
#include "cpu/lookup.h"
#include "cpu/optimizers.h"

namespace embcompress {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel_parts(int parts, void (*f)(int part, void* context), void* context) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) f(static_cast<int>(part), context);
    });
}

namespace {

// ------------------------------------------------------------------------------------- checks

// Arithmetic on anything up to this cannot overflow.
constexpr int64_t kMostBits = std::numeric_limits<int64_t>::max() - 7;

Dtype float_dtype(const Tensor& tensor, const char* name) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
        " must be float32, float16 or bfloat16");
    if (type == ScalarType::Float) return Dtype::kFloat32;
    return type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

StoreView view_store(const Tensor& store) {
    STD_TORCH_CHECK(store.is_cpu() && store.is_contiguous(),
                    "stores must be contiguous CPU tensors");
    const int64_t bytes = store.numel() * static_cast<int64_t>(store.element_size());
    if (store.scalar_type() == ScalarType::Byte) {
        STD_TORCH_CHECK(store.dim() == 1, "packed stores must be 1-D");
        return {store.const_data_ptr(), Dtype::kPacked, 0, 0, bytes};
    }
    STD_TORCH_CHECK(store.dim() == 2, "float stores must be 2-D");
    const Dtype dtype = float_dtype(store, "stores that are not packed");
    return {store.const_data_ptr(), dtype, store.size(0), store.size(1), bytes};
}

const StoreView& store_at(const Lookup& lookup, int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(lookup.stores.size()),
                    "encoding: store ", number, " of ", lookup.stores.size());
    return lookup.stores[number];
}

// Largest row that an address can give, plus 1.
int64_t address_size(const Address& address) {
    STD_TORCH_CHECK(address.b >= 1, "encoding: an empty address");
    STD_TORCH_CHECK(address.kind == AddressKind::kHash ||
                        (address.kind == AddressKind::kDigit && address.a >= 1) ||
                        (address.kind == AddressKind::kMurmur && address.a >= 0),
                    "encoding: unknown address");
    return address.b;
}

void check_float_store(const StoreView& store, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(store.dtype != Dtype::kPacked && store.rows >= rows && store.width >= columns,
                    "encoding: reads ", rows, " x ", columns, " of a store of ", store.rows, " x ",
                    store.width);
}

// `rows` and `width` are positive.
void check_packed_store(const StoreView& store, int64_t rows, int64_t width, int64_t bits) {
    STD_TORCH_CHECK(store.dtype == Dtype::kPacked && bits >= 1 && bits <= 32 &&
                        rows <= kMostBits / bits / width &&
                        (rows * width * bits + 7) / 8 <= store.bytes,
                    "encoding: reads ", rows, " x ", width, " numbers of ", bits,
                    " bits of a store of ", store.bytes, " bytes");
}

void check_quantization(const Lookup& lookup, const Probe& probe, int64_t rows) {
    const Quantization& q = probe.quantization;
    STD_TORCH_CHECK(q.bits == 1 || q.bits == 2 || q.bits == 4 || q.bits == 8,
                    "encoding: values of ", q.bits, " bits");
    const StoreView& store = store_at(lookup, probe.store);
    if (store.dtype == Dtype::kPacked) {
        check_packed_store(store, rows, probe.width, q.bits);
    } else {  // latents, in training
        check_float_store(store, rows, probe.width);
        STD_TORCH_CHECK(store.width == probe.width, "encoding: reads latents of ", probe.width,
                        " numbers of a store of ", store.rows, " x ", store.width);
    }
    const int64_t part_rows = q.per_row ? rows : 1;
    const int64_t part_columns = q.per_column ? probe.width : 1;
    const StoreView& scale = store_at(lookup, q.scale_store);
    check_float_store(scale, part_rows, part_columns);
    if (q.bias_store < 0) return;
    const StoreView& bias = store_at(lookup, q.bias_store);
    check_float_store(bias, part_rows, part_columns);
    STD_TORCH_CHECK(scale.width == bias.width, "encoding: steps of ", scale.width,
                    " columns, biases of ", bias.width);
}

// Largest row that the address or its code can give, plus 1.
int64_t check_address(const Lookup& lookup, const Address& address, const Code& code) {
    const int64_t rows = address_size(address);
    if (code.store < 0) return rows;
    STD_TORCH_CHECK(code.width >= 1 && code.column >= 0 && code.column < code.width &&
                        code.size >= 1 && code.first >= 0,
                    "encoding: codes of no column or no size");
    check_packed_store(store_at(lookup, code.store), rows, code.width, code.bits);
    if (code.has_otherwise) {
        STD_TORCH_CHECK(address_size(code.otherwise) <= code.size, "encoding: otherwise");
    }
    return code.size;
}

void check_probe(const Lookup& lookup, const Probe& probe, const Feature& feature) {
    STD_TORCH_CHECK(probe.width >= 1 && probe.width <= feature.width && probe.column >= 0 &&
                        probe.column <= feature.width - probe.width && probe.offset >= 0,
                    "encoding: columns or offset of a probe");
    STD_TORCH_CHECK(feature.combine == Combine::kConcat || probe.width == feature.width,
                    "encoding: width of a probe");
    int64_t rows = check_address(lookup, probe.address, probe.code);
    STD_TORCH_CHECK(rows <= kMostBits - probe.offset, "encoding: offset of a probe");
    rows += probe.offset;
    if (probe.quantization.bits == 0) {
        const StoreView& store = store_at(lookup, probe.store);
        check_float_store(store, rows, probe.width);
        STD_TORCH_CHECK(store.width == probe.width, "encoding: reads rows of ", probe.width,
                        " numbers of a store of ", store.rows, " x ", store.width);
    } else {
        check_quantization(lookup, probe, rows);
    }
    const Scale& scale = probe.scale;
    STD_TORCH_CHECK(scale.kind == ScaleKind::kNone || scale.kind == ScaleKind::kSign ||
                        scale.kind == ScaleKind::kWeight,
                    "encoding: unknown scale");
    if (scale.kind == ScaleKind::kWeight) {
        const StoreView& store = store_at(lookup, scale.store);
        check_float_store(store, check_address(lookup, scale.address, scale.code), 1);
        STD_TORCH_CHECK(scale.column >= 0 && scale.column < store.width,
                        "encoding: takes scales from column ", scale.column, " of ", store.width);
    }
}

// A feature's record; its columns and probes follow those of the feature before.
void check_feature(const Lookup& lookup, const Feature& feature, int64_t column, int64_t probe) {
    STD_TORCH_CHECK(feature.num_embeddings >= 1 && feature.padding_idx >= -1 &&
                        feature.padding_idx < feature.num_embeddings,
                    "encoding: ", feature.num_embeddings, " ids, padding ", feature.padding_idx);
    STD_TORCH_CHECK(
        feature.pool == Pool::kNone || feature.pool == Pool::kSum || feature.pool == Pool::kMean,
        "encoding: unknown pool");
    STD_TORCH_CHECK(feature.combine == Combine::kSum || feature.combine == Combine::kMul ||
                        feature.combine == Combine::kConcat,
                    "encoding: unknown combine");
    STD_TORCH_CHECK(feature.out_column == column && feature.width >= 1 && feature.out_width >= 1 &&
                        feature.out_width <= lookup.header.num_columns - column,
                    "encoding: columns of a feature");
    if (feature.head_store < 0) {
        STD_TORCH_CHECK(feature.width == feature.out_width, "encoding: width of a feature");
    } else {
        const StoreView& head = store_at(lookup, feature.head_store);
        STD_TORCH_CHECK(head.dtype != Dtype::kPacked && head.rows == feature.out_width &&
                            head.width == feature.width,
                        "encoding: a head of ", head.rows, " x ", head.width, " for ",
                        feature.width, " columns to ", feature.out_width);
    }
    STD_TORCH_CHECK(feature.first_probe == probe && feature.num_probes >= 1 &&
                        feature.num_probes <= lookup.header.num_probes - probe,
                    "encoding: probes of a feature");
    int64_t end = 0;
    for (int64_t t = 0; t < feature.num_probes; ++t) {
        const Probe& each = lookup.probes[probe + t];
        check_probe(lookup, each, feature);
        STD_TORCH_CHECK(each.column == end, "encoding: column of a probe");
        end += feature.combine == Combine::kConcat ? each.width : 0;
    }
    STD_TORCH_CHECK(feature.combine != Combine::kConcat || end == feature.width,
                    "encoding: columns that no probe fills");
}

// Sets the records of the lookup, and checks every number in them.
void read_encoding(Lookup& lookup, const Tensor& encoding) {
    STD_TORCH_CHECK(encoding.is_cpu() && encoding.is_contiguous() &&
                        encoding.scalar_type() == ScalarType::Long &&
                        encoding.numel() > kHeaderFields,
                    "the encoding must be a contiguous int64 CPU tensor");
    const int64_t* fields = static_cast<const int64_t*>(encoding.const_data_ptr());
    const int64_t length = encoding.numel();
    const Header& header = lookup.header = *reinterpret_cast<const Header*>(fields);
    STD_TORCH_CHECK(header.format == kFormat, "encoding of another format");
    STD_TORCH_CHECK(header.num_features >= 1 && header.num_features <= length &&
                        header.num_probes >= 1 && header.num_probes <= length &&
                        length == kHeaderFields + header.num_features * kFeatureFields +
                                      header.num_probes * kProbeFields,
                    "encoding of the wrong length");
    fields += kHeaderFields;
    lookup.features = reinterpret_cast<const Feature*>(fields);
    lookup.probes = reinterpret_cast<const Probe*>(fields + header.num_features * kFeatureFields);
    int64_t column = 0, probe = 0;
    for (int64_t f = 0; f < header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        check_feature(lookup, feature, column, probe);
        column += feature.out_width;
        probe += feature.num_probes;
    }
    STD_TORCH_CHECK(column == header.num_columns && probe == header.num_probes,
                    "encoding: columns or probes of no feature");
}

void check_offsets(Lookup& lookup, bool ends_are_given) {
    const int64_t bags = lookup.header.num_features * lookup.batch;
    STD_TORCH_CHECK(bags >= 0 && lookup.num_offsets == bags + ends_are_given, "offsets has ",
                    lookup.num_offsets, " entries, which is not ", lookup.header.num_features,
                    " features * B", ends_are_given ? " + 1" : "");
    STD_TORCH_CHECK(lookup.offset(0) == 0, "offsets[0] must be 0");
    STD_TORCH_CHECK(lookup.offset(bags) == lookup.num_ids,
                    "the last offset must be the number of ids, ", lookup.num_ids);
    const Lengths lengths = bag_lengths(lookup);
    STD_TORCH_CHECK(bags == 0 || (lengths.shortest >= 0 && lengths.longest <= lookup.num_ids),
                    "offsets must rise from 0 to the number of ids");
    lookup.longest_bag = lengths.longest;
    if (lengths.shortest == 1 && lengths.longest == 1) lookup.offsets = nullptr;
}

bool is_32_bit(const Tensor& tensor) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long,
        "ids and offsets must be int32 or int64");
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.is_contiguous(),
                    "ids and offsets must be contiguous 1-D CPU tensors");
    return tensor.scalar_type() == ScalarType::Int;
}

Lookup make_lookup(const std::vector<Tensor>& stores, const Tensor& ids,
                   const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                   const Tensor& encoding, bool ends_are_given) {
    Lookup lookup{};
    for (const Tensor& store : stores) lookup.stores.push_back(view_store(store));
    read_encoding(lookup, encoding);
    lookup.ids = ids.const_data_ptr();
    lookup.ids_are_32_bit = is_32_bit(ids);
    lookup.num_ids = ids.numel();
    if (offsets.has_value()) {
        STD_TORCH_CHECK(is_32_bit(*offsets) == lookup.ids_are_32_bit,
                        "ids and offsets must be of one dtype");
        lookup.offsets = offsets->const_data_ptr();
        lookup.num_offsets = offsets->numel();
        lookup.batch = (offsets->numel() - ends_are_given) / lookup.header.num_features;
        check_offsets(lookup, ends_are_given);
    } else {
        STD_TORCH_CHECK(lookup.header.num_features == 1, "many features need offsets");
        lookup.batch = lookup.num_ids;
        lookup.longest_bag = 1;
    }
    if (weights.has_value()) {
        STD_TORCH_CHECK(weights->is_cpu() && weights->is_contiguous() && weights->dim() == 1 &&
                            weights->numel() == lookup.num_ids,
                        "per_sample_weights must be a contiguous 1-D CPU tensor, one for each of ",
                        lookup.num_ids, " ids");
        lookup.weights_dtype = float_dtype(*weights, "per_sample_weights");
        lookup.weights = weights->const_data_ptr();
    }
    return lookup;
}

void check_ids(bool valid) { STD_TORCH_CHECK(valid, "an id is outside the vocabulary"); }

Tensor check_gradient(const Tensor& grad, const Lookup& lookup) {
    STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 2 && grad.scalar_type() == ScalarType::Float &&
                        grad.size(0) == lookup.batch && grad.size(1) == lookup.header.num_columns,
                    "the gradient must be float32 of the output's shape");
    return torch::stable::contiguous(grad);
}

// Wanted stores are float, and wanted once.
void check_wanted(const Lookup& lookup, const std::vector<int64_t>& wanted) {
    std::vector<bool> seen(lookup.stores.size());
    for (const int64_t store : wanted) {
        STD_TORCH_CHECK(store_at(lookup, store).dtype != Dtype::kPacked,
                        "packed stores have no gradient");
        STD_TORCH_CHECK(!seen[store], "the gradient of store ", store, " is wanted twice");
        seen[store] = true;
    }
}

const float* floats(const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Room for the touched rows of a wanted store and their gradients.
struct Touched {
    Tensor rows;
    Tensor values;

    Touched(const StoreGradients& gradients, size_t k, int64_t width)
        : rows(torch::stable::empty({gradients.num_touched(k)}, ScalarType::Long)),
          values(torch::stable::empty({gradients.num_touched(k), width}, ScalarType::Float)) {}

    GradientSink sink() {
        return {nullptr, static_cast<int64_t*>(rows.mutable_data_ptr()), mutable_floats(values),
                nullptr};
    }
};

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
    check_wanted(what, wanted);
    StoreGradients gradients(what, floats(gradient), wanted, threads());
    check_ids(gradients.prepare());
    std::vector<Tensor> results;
    std::vector<GradientSink> sinks;
    for (const int64_t store : wanted) {
        const StoreView& view = what.stores[store];
        Tensor dense = torch::stable::empty({view.rows, view.width}, ScalarType::Float);
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
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, what);
    check_wanted(what, wanted);
    StoreGradients gradients(what, floats(gradient), wanted, threads());
    check_ids(gradients.prepare());
    std::vector<Tensor> results;
    std::vector<GradientSink> sinks;
    for (size_t k = 0; k < wanted.size(); ++k) {
        Touched touched(gradients, k, what.stores[wanted[k]].width);
        sinks.push_back(touched.sink());
        results.push_back(touched.rows);
        results.push_back(touched.values);
    }
    gradients.reduce(sinks);
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

Optimizer read_optimizer(const Tensor& settings, int64_t kind) {
    STD_TORCH_CHECK(kind >= 0 && kind <= 3, "unknown optimizer ", kind);
    STD_TORCH_CHECK(settings.is_cpu() && settings.is_contiguous() &&
                        settings.scalar_type() == ScalarType::Double && settings.numel() == 5,
                    "settings must be 5 float64 numbers on the CPU");
    const double* numbers = static_cast<const double*>(settings.const_data_ptr());
    Optimizer optimizer{};
    optimizer.kind = static_cast<OptimizerKind>(kind);
    optimizer.learning_rate = static_cast<float>(numbers[0]);
    optimizer.epsilon = static_cast<float>(numbers[1]);
    optimizer.weight_decay = static_cast<float>(numbers[2]);
    optimizer.beta1 = static_cast<float>(numbers[3]);
    optimizer.beta2 = static_cast<float>(numbers[4]);
    return optimizer;
}

void check_state(const std::vector<Tensor>& state, size_t number, ScalarType type,
                 int64_t numbers) {
    STD_TORCH_CHECK(number < state.size() && state[number].is_cpu() &&
                        state[number].is_contiguous() && state[number].scalar_type() == type &&
                        state[number].numel() == numbers,
                    "optimizer state of the wrong shape or dtype, or of too few stores");
}

// How a wanted store is updated, all of it checked. Raises its number of steps.
Updated read_updated(const Lookup& what, const Optimizer& optimizer, Tensor& store, int64_t number,
                     size_t k, std::vector<Tensor>& first, std::vector<Tensor>& second,
                     std::vector<Tensor>& steps) {
    const StoreView& view = what.stores[number];
    STD_TORCH_CHECK(view.dtype == Dtype::kFloat32, "fused updates need float32 stores");
    const bool rowwise = optimizer.kind == OptimizerKind::kRowwiseAdagrad;
    const int64_t numbers = view.rows * (rowwise ? 1 : view.width);
    Updated updated{optimizer, view.width, mutable_floats(store), nullptr, nullptr};
    if (optimizer.kind != OptimizerKind::kSgd) {
        check_state(first, k, ScalarType::Float, numbers);
        updated.first = mutable_floats(first[k]);
    }
    if (optimizer.kind == OptimizerKind::kAdam) {
        check_state(second, k, ScalarType::Float, numbers);
        updated.second = mutable_floats(second[k]);
    }
    check_state(steps, k, ScalarType::Long, 1);
    updated.optimizer.step = *static_cast<const int64_t*>(steps[k].const_data_ptr());
    STD_TORCH_CHECK(updated.optimizer.step >= 0, "a negative number of steps");
    ++updated.optimizer.step;
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
    const Lookup what = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor gradient = check_gradient(grad, what);
    check_wanted(what, wanted);
    const Optimizer optimizer = read_optimizer(settings, kind);
    std::vector<Updated> updated;
    for (size_t k = 0; k < wanted.size(); ++k) {
        updated.push_back(
            read_updated(what, optimizer, stores[wanted[k]], wanted[k], k, first, second, steps));
    }
    StoreGradients gradients(what, floats(gradient), wanted, threads());
    check_ids(gradients.prepare());
    // Rows that other gradients are read from must not move before those are complete.
    std::vector<GradientSink> sinks;
    std::vector<std::pair<size_t, Touched>> later;
    for (size_t k = 0; k < wanted.size(); ++k) {
        if (gradients.may_update(k)) {
            sinks.push_back({nullptr, nullptr, nullptr, &updated[k]});
        } else {
            later.emplace_back(k, Touched(gradients, k, updated[k].width));
            sinks.push_back(later.back().second.sink());
        }
    }
    gradients.reduce(sinks);
    for (auto& [k, touched] : later) {
        update_rows(updated[k], static_cast<const int64_t*>(touched.rows.const_data_ptr()),
                    floats(touched.values), gradients.num_touched(k), threads());
    }
    for (size_t k = 0; k < wanted.size(); ++k) {
        *static_cast<int64_t*>(steps[k].mutable_data_ptr()) = updated[k].optimizer.step;
    }
}

}  // namespace
}  // namespace embcompress

STABLE_TORCH_LIBRARY(embcompress, m) {
    m.def(
        "lookup(Tensor[] stores, Tensor ids, Tensor? offsets, Tensor? weights, Tensor encoding, "
        "bool ends_are_given, int num_features, int num_columns, bool sparse) -> Tensor");
    // The same without a gradient formula: what eager code calls inside its own autograd.Function,
    // because a formula registered from Python costs more than a small batch.
    m.def(
        "lookup_forward(Tensor[] stores, Tensor ids, Tensor? offsets, Tensor? weights, "
        "Tensor encoding, bool ends_are_given, int num_features, int num_columns, bool sparse) "
        "-> Tensor");
    m.def(
        "lookup_backward(Tensor grad, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int[] wanted) -> Tensor[]");
    m.def(
        "lookup_backward_sparse(Tensor grad, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int[] wanted) -> Tensor[]");
    m.def(
        "lookup_backward_weights(Tensor grad, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given) -> Tensor");
    m.def(
        "lookup_backward_update(Tensor grad, Tensor(a!)[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int[] wanted, Tensor(b!)[] first, "
        "Tensor(c!)[] second, Tensor(d!)[] steps, Tensor settings, int kind) -> ()");
    m.def(
        "lookup_fused(Tensor anchor, Tensor[] stores, Tensor ids, Tensor? offsets, "
        "Tensor? weights, Tensor encoding, bool ends_are_given, int num_features, "
        "int num_columns, int[] wanted, Tensor[] first, Tensor[] second, Tensor[] steps, "
        "Tensor settings, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(embcompress, CPU, m) {
    m.impl("lookup", TORCH_BOX(&embcompress::lookup));
    m.impl("lookup_forward", TORCH_BOX(&embcompress::lookup));
    m.impl("lookup_backward", TORCH_BOX(&embcompress::lookup_backward));
    m.impl("lookup_backward_sparse", TORCH_BOX(&embcompress::lookup_backward_sparse));
    m.impl("lookup_backward_weights", TORCH_BOX(&embcompress::lookup_backward_weights));
    m.impl("lookup_backward_update", TORCH_BOX(&embcompress::lookup_backward_update));
    m.impl("lookup_fused", TORCH_BOX(&embcompress::lookup_fused));
}

// An empty Python module: importing it loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
