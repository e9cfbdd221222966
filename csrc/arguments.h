// Checks of everything that the operators are given, before any kernel sees it: a wrong encoding,
// store or offset is an error, never a read out of bounds.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/lookup.h"
#include "optimizer.h"

namespace embcompress {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arithmetic on anything up to this cannot overflow.
constexpr int64_t kMostBits = std::numeric_limits<int64_t>::max() - 7;

inline Dtype float_dtype(ScalarType type, const char* name) {
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
        " must be float32, float16 or bfloat16");
    if (type == ScalarType::Float) return Dtype::kFloat32;
    return type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

// Whether a tensor is where the ids are: on the device whose kernels run.
inline bool is_beside(const Tensor& tensor, const Tensor& ids) {
    return tensor.device() == ids.device();
}

inline StoreView view_store(const Tensor& store, const Tensor& ids) {
    STD_TORCH_CHECK(is_beside(store, ids) && store.is_contiguous(),
                    "stores must be contiguous tensors on the device of the ids");
    const int64_t bytes = store.numel() * static_cast<int64_t>(store.element_size());
    const ScalarType type = store.scalar_type();
    if (type == ScalarType::Byte) {
        STD_TORCH_CHECK(store.dim() == 1, "packed stores must be 1-D");
        return {store.const_data_ptr(), Dtype::kPacked, 0, 0, bytes};
    }
    const Dtype dtype = float_dtype(type, "stores that are not packed");
    if (store.dim() == 1) return {store.const_data_ptr(), dtype, store.size(0), 0, bytes};
    STD_TORCH_CHECK(store.dim() == 2 && store.size(1) > 0,
                    "float stores must be 2-D, or 1-D where they are sparse");
    return {store.const_data_ptr(), dtype, store.size(0), store.size(1), bytes};
}

inline const StoreView& store_at(const Lookup& lookup, int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(lookup.stores.size()),
                    "encoding: store ", number, " of ", lookup.stores.size());
    return lookup.stores[number];
}

// Largest row that an address can give, plus 1.
inline int64_t address_size(const Address& address) {
    STD_TORCH_CHECK(address.b >= 1, "encoding: an empty address");
    STD_TORCH_CHECK(address.kind == AddressKind::kHash ||
                        (address.kind == AddressKind::kDigit && address.a >= 1) ||
                        (address.kind == AddressKind::kMurmur && address.a >= 0),
                    "encoding: unknown address");
    return address.b;
}

inline void check_float_store(const StoreView& store, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(store.dtype != Dtype::kPacked && store.rows >= rows && store.width >= columns,
                    "encoding: reads ", rows, " x ", columns, " of a store of ", store.rows, " x ",
                    store.width);
}

// `rows` and `width` are positive.
inline void check_packed_store(const StoreView& store, int64_t rows, int64_t width, int64_t bits) {
    STD_TORCH_CHECK(store.dtype == Dtype::kPacked && bits >= 1 && bits <= 32 &&
                        rows <= kMostBits / bits / width &&
                        (rows * width * bits + 7) / 8 <= store.bytes,
                    "encoding: reads ", rows, " x ", width, " numbers of ", bits,
                    " bits of a store of ", store.bytes, " bytes");
}

inline void check_quantization(const Lookup& lookup, const Probe& probe, int64_t rows) {
    const Quantization& q = probe.quantization;
    STD_TORCH_CHECK(q.bits == 1 || q.bits == 2 || q.bits == 4 || q.bits == 8 || q.bits == 16,
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

inline void check_sparsity(const Lookup& lookup, const Probe& probe, int64_t rows) {
    const Sparsity& s = probe.sparsity;
    STD_TORCH_CHECK((s.form == SparsityForm::kMask || s.form == SparsityForm::kPositions) &&
                        s.stored >= 1 && s.rows >= rows && s.block >= 1,
                    "encoding: sparse rows of no numbers or no blocks");
    const StoreView& store = store_at(lookup, probe.store);
    const StoreView& index = store_at(lookup, s.index_store);
    if (store.width > 0) {  // latents under a mask, in training
        check_float_store(store, s.rows, probe.width);
        STD_TORCH_CHECK(store.width == probe.width, "encoding: reads latents of ", probe.width,
                        " numbers of a store of ", store.rows, " x ", store.width);
        return check_packed_store(index, s.rows, probe.width, 1);
    }
    STD_TORCH_CHECK(store.dtype != Dtype::kPacked && store.rows >= s.stored, "encoding: reads ",
                    s.stored, " numbers of a sparse store of ", store.rows);
    const int64_t blocks = (s.rows - 1) / s.block + 1;
    check_packed_store(store_at(lookup, s.starts_store), blocks, 1, s.starts_bits);
    if (s.form == SparsityForm::kMask) return check_packed_store(index, s.rows, probe.width, 1);
    check_packed_store(index, s.stored, 1, s.index_bits);
}

// Largest row that the address or its code in a table can give, plus 1.
inline int64_t check_table(const Lookup& lookup, const Address& address, const CodeTable& table) {
    const int64_t rows = address_size(address);
    if (table.store < 0) return rows;
    STD_TORCH_CHECK(table.width >= 1 && table.column >= 0 && table.column < table.width &&
                        table.size >= 1 && table.first >= 0,
                    "encoding: codes of no column or no size");
    check_packed_store(store_at(lookup, table.store), rows, table.width, table.bits);
    STD_TORCH_CHECK(table.is_slot == 0 || table.is_slot == 1, "encoding: neither codes nor slots");
    if (table.is_slot) {
        STD_TORCH_CHECK(address_size(table.tag) < (1LL << table.bits), "encoding: ", table.tag.b,
                        " tags of ", table.bits, " bits");
        STD_TORCH_CHECK(table.first <= kMostBits - rows * table.width, "encoding: first of slots");
    }
    return table.size;
}

// The same for an address that goes on to another where the code is absent.
inline int64_t check_address(const Lookup& lookup, const Address& address, const Code& code) {
    const int64_t rows = check_table(lookup, address, code.table);
    if (code.table.store >= 0 && code.has_otherwise) {
        STD_TORCH_CHECK(check_table(lookup, code.otherwise, code.other) <= rows,
                        "encoding: otherwise");
    }
    return rows;
}

// Rows of a float store are its tensor's, or overlap: then they begin and end where rows of the
// tensor do, which are the pieces that gradients are added up in.
inline void check_rows(const StoreView& store, int64_t rows, const Probe& probe) {
    if (probe.stride == probe.width) {
        check_float_store(store, rows, probe.width);
        STD_TORCH_CHECK(store.width == probe.width, "encoding: reads rows of ", probe.width,
                        " numbers of a store of ", store.rows, " x ", store.width);
        return;
    }
    check_float_store(store, 1, 1);
    STD_TORCH_CHECK(probe.stride >= 1 && probe.stride < probe.width &&
                        probe.stride % store.width == 0 && probe.width % store.width == 0,
                    "encoding: reads rows of ", probe.width, " numbers, ", probe.stride,
                    " apart, of a store of ", store.rows, " x ", store.width);
    const int64_t pieces = probe.width / store.width;
    STD_TORCH_CHECK(
        pieces <= store.rows && rows - 1 <= (store.rows - pieces) / (probe.stride / store.width),
        "encoding: reads ", rows, " overlapping rows of a store of ", store.rows, " x ",
        store.width);
}

inline void check_probe(const Lookup& lookup, const Probe& probe, const Feature& feature) {
    STD_TORCH_CHECK(probe.width >= 1 && probe.width <= feature.width && probe.column >= 0 &&
                        probe.column <= feature.width - probe.width && probe.offset >= 0,
                    "encoding: columns or offset of a probe");
    STD_TORCH_CHECK(feature.combine == Combine::kPlace || probe.width == feature.width,
                    "encoding: width of a probe");
    int64_t rows = check_address(lookup, probe.address, probe.code);
    STD_TORCH_CHECK(rows <= kMostBits - probe.offset, "encoding: offset of a probe");
    rows += probe.offset;
    if (probe.sparsity.form != SparsityForm::kNone) {
        STD_TORCH_CHECK(probe.quantization.bits == 0 && probe.stride == probe.width,
                        "encoding: packed or overlapping rows that are sparse");
        check_sparsity(lookup, probe, rows);
    } else if (probe.quantization.bits == 0) {
        check_rows(store_at(lookup, probe.store), rows, probe);
    } else {
        STD_TORCH_CHECK(probe.stride == probe.width, "encoding: packed rows that overlap");
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
inline void check_feature(const Lookup& lookup, const Feature& feature, int64_t column,
                          int64_t probe) {
    STD_TORCH_CHECK(feature.num_embeddings >= 1 && feature.padding_idx >= -1 &&
                        feature.padding_idx < feature.num_embeddings,
                    "encoding: ", feature.num_embeddings, " ids, padding ", feature.padding_idx);
    STD_TORCH_CHECK(
        feature.pool == Pool::kNone || feature.pool == Pool::kSum || feature.pool == Pool::kMean,
        "encoding: unknown pool");
    STD_TORCH_CHECK(feature.combine == Combine::kSum || feature.combine == Combine::kMul ||
                        feature.combine == Combine::kPlace,
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
        STD_TORCH_CHECK(each.column <= end, "encoding: column of a probe");
        end = std::max(end, each.column + each.width);
    }
    STD_TORCH_CHECK(end == feature.width, "encoding: columns that no probe fills");
}

// Sets the records of the lookup, and checks every number in them.
inline void read_encoding(Lookup& lookup, const Tensor& encoding) {
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

inline void check_number_of_offsets(const Lookup& lookup, bool ends_are_given) {
    const int64_t bags = lookup.header.num_features * lookup.batch;
    STD_TORCH_CHECK(bags >= 0 && lookup.num_offsets == bags + ends_are_given, "offsets has ",
                    lookup.num_offsets, " entries, which is not ", lookup.header.num_features,
                    " features * B", ends_are_given ? " + 1" : "");
}

inline bool is_32_bit(const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                    "ids and offsets must be int32 or int64");
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(),
                    "ids and offsets must be contiguous 1-D tensors");
    return type == ScalarType::Int;
}

// What the arguments of a call describe. The values of ids and offsets are left to the kernels.
inline Lookup make_lookup(const std::vector<Tensor>& stores, const Tensor& ids,
                          const std::optional<Tensor>& offsets,
                          const std::optional<Tensor>& weights, const Tensor& encoding,
                          bool ends_are_given) {
    Lookup lookup{};
    lookup.stores.reserve(stores.size());
    for (const Tensor& store : stores) lookup.stores.push_back(view_store(store, ids));
    read_encoding(lookup, encoding);
    lookup.ids = ids.const_data_ptr();
    lookup.ids_are_32_bit = is_32_bit(ids);
    lookup.num_ids = ids.numel();
    if (offsets.has_value()) {
        STD_TORCH_CHECK(is_32_bit(*offsets) == lookup.ids_are_32_bit && is_beside(*offsets, ids),
                        "ids and offsets must be of one dtype and device");
        lookup.offsets = offsets->const_data_ptr();
        lookup.num_offsets = offsets->numel();
        lookup.batch = (offsets->numel() - ends_are_given) / lookup.header.num_features;
        check_number_of_offsets(lookup, ends_are_given);
    } else {
        STD_TORCH_CHECK(lookup.header.num_features == 1, "many features need offsets");
        lookup.batch = lookup.num_ids;
        lookup.longest_bag = 1;
    }
    if (weights.has_value()) {
        STD_TORCH_CHECK(is_beside(*weights, ids) && weights->is_contiguous() &&
                            weights->dim() == 1 && weights->numel() == lookup.num_ids,
                        "per_sample_weights must be a contiguous 1-D tensor, one for each of ",
                        lookup.num_ids, " ids");
        lookup.weights_dtype = float_dtype(weights->scalar_type(), "per_sample_weights");
        lookup.weights = weights->const_data_ptr();
    }
    return lookup;
}

inline void check_ids(bool valid) { STD_TORCH_CHECK(valid, "an id is outside the vocabulary"); }

inline Tensor check_gradient(const Tensor& grad, const Tensor& ids, const Lookup& lookup) {
    STD_TORCH_CHECK(is_beside(grad, ids) && grad.dim() == 2 &&
                        grad.scalar_type() == ScalarType::Float && grad.size(0) == lookup.batch &&
                        grad.size(1) == lookup.header.num_columns,
                    "the gradient must be float32 of the output's shape");
    return torch::stable::contiguous(grad);
}

// The stores whose gradient is wanted: float, and each wanted once.
inline void check_wanted(const Lookup& lookup, const std::vector<int64_t>& wanted) {
    std::vector<bool> seen(lookup.stores.size(), false);
    for (const int64_t store : wanted) {
        STD_TORCH_CHECK(
            store_at(lookup, store).dtype != Dtype::kPacked && lookup.stores[store].width > 0,
            "packed stores have no gradient");
        STD_TORCH_CHECK(!seen[store], "the gradient of store ", store, " is wanted twice");
        seen[store] = true;
    }
}

inline Optimizer read_optimizer(const Tensor& settings, int64_t kind) {
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

inline void check_state(const std::vector<Tensor>& state, size_t number, const Tensor& beside,
                        ScalarType type, int64_t numbers) {
    STD_TORCH_CHECK(number < state.size() && is_beside(state[number], beside) &&
                        state[number].is_contiguous() && state[number].scalar_type() == type &&
                        state[number].numel() == numbers,
                    "optimizer state of the wrong shape, dtype or device, or of too few stores");
}

// State of an update: where the optimizer has it, that of each wanted store, and its steps.
inline void check_states(const Optimizer& optimizer, const Lookup& lookup, const Tensor& ids,
                         const std::vector<int64_t>& wanted, const std::vector<Tensor>& first,
                         const std::vector<Tensor>& second, const std::vector<Tensor>& steps) {
    for (size_t k = 0; k < wanted.size(); ++k) {
        const StoreView& view = lookup.stores[wanted[k]];
        STD_TORCH_CHECK(view.dtype == Dtype::kFloat32, "fused updates need float32 stores");
        const int64_t numbers = view.rows * state_width(optimizer.kind, view.width);
        if (has_first(optimizer.kind)) check_state(first, k, ids, ScalarType::Float, numbers);
        if (has_second(optimizer.kind)) check_state(second, k, ids, ScalarType::Float, numbers);
        STD_TORCH_CHECK(k < steps.size() && steps[k].is_cpu(),
                        "optimizer state: steps of each wanted store must be on the CPU");
        check_state(steps, k, steps[k], ScalarType::Long, 1);
        STD_TORCH_CHECK(*static_cast<const int64_t*>(steps[k].const_data_ptr()) >= 0,
                        "a negative number of steps");
    }
}

}  // namespace embcompress
