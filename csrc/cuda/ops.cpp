// The operators embcompress::* on CUDA, through torch's stable ABI: allocation and launches on the
// current stream. Kernels report wrong ids and offsets to flags that the host reads at every call,
// without waiting.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "binding.h"

namespace embcompress {
namespace cuda {
namespace {

// The device and stream of a call.
class Place {
  public:
#if defined(EMBCOMPRESS_EMULATION)
    explicit Place(const Tensor&) {}
#else
    explicit Place(const Tensor& ids) : guard_(checked_index(ids)) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(ids.get_device_index(), &stream));
        this->stream = static_cast<cudaStream_t>(stream);
    }
#endif
    cudaStream_t stream = nullptr;

  private:
#if !defined(EMBCOMPRESS_EMULATION)
    static int32_t checked_index(const Tensor& ids) {
        STD_TORCH_CHECK(ids.is_cuda(), "stores are on a CUDA device, ids are not; move the ids");
        return ids.get_device_index();
    }
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Raises what kernels have reported since the last call. Python knows these errors by their end.
void raise_reported() {
    volatile Errors* errors = error_flags();
    const bool ids = errors->ids != 0, offsets = errors->offsets != 0;
    errors->ids = errors->offsets = 0;
    STD_TORCH_CHECK(!offsets,
                    "offsets must rise from 0 to the number of ids (in this lookup, or an earlier "
                    "one on a GPU: CUDA_LAUNCH_BLOCKING=1 tells which)");
    STD_TORCH_CHECK(!ids,
                    "an id is outside the vocabulary (of this lookup, or an earlier one on a GPU: "
                    "CUDA_LAUNCH_BLOCKING=1 tells which)");
}

Tensor new_tensor(const Tensor& ids, std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(ids, shape, dtype);
}

template <typename T>
T* pointer(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

Lookup check_lookup(const std::vector<Tensor>& stores, const Tensor& ids,
                    const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                    const Tensor& encoding, bool ends_are_given) {
    raise_reported();
    const Lookup lookup = make_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    STD_TORCH_CHECK(lookup.batch > 0 || lookup.num_ids == 0,
                    "offsets describe no bags, but ids has ", lookup.num_ids, " entries");
    STD_TORCH_CHECK(lookup.num_ids <= kMostIds, "more than 2^31 ids in one call");
    STD_TORCH_CHECK(lookup.header.num_features < 65536, "more than 65535 features in one call");
    const int64_t bags = lookup.header.num_features * lookup.batch;
    STD_TORCH_CHECK(bags <= kMostTouches, "more than 2^32 bags in one call");
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        STD_TORCH_CHECK(lookup.features[f].head_store < 0,
                        "the CUDA kernels run no heads; feature ", f, " has one");
    }
    for (int64_t p = 0; p < lookup.header.num_probes; ++p) {
        STD_TORCH_CHECK(lookup.probes[p].stride == lookup.probes[p].width,
                        "the CUDA kernels read no rows that overlap; probe ", p, " does");
        STD_TORCH_CHECK(lookup.probes[p].sparsity.form == SparsityForm::kNone,
                        "the CUDA kernels read no sparse rows; probe ", p, " does");
    }
    return lookup;
}

// A plan as a launch takes it, in `memory` where it is large; that must live until the launch.
PlanArgument argument_of(const PlanWords& plan, const Tensor& ids, const Place& place,
                         std::optional<Tensor>& memory) {
    PlanArgument argument{};
    argument.layout = plan.layout;
    if (plan.fits_inline()) {
        std::copy(plan.words.begin(), plan.words.end(), argument.words);
        return argument;
    }
    memory = new_tensor(ids, {static_cast<int64_t>(plan.words.size())}, ScalarType::Long);
    upload(plan, pointer<int64_t>(*memory), place.stream);
    argument.memory = pointer<int64_t>(*memory);
    return argument;
}

void check_shared(int64_t bytes, const DeviceLimits& device) {
    STD_TORCH_CHECK(bytes <= device.shared_bytes,
                    "a feature has too many probes for the CUDA kernels: they need ", bytes,
                    " bytes of shared memory, the device has ", device.shared_bytes);
}

// ------------------------------------------------------------------------------------ forward

Tensor lookup(std::vector<Tensor> stores, Tensor ids, std::optional<Tensor> offsets,
              std::optional<Tensor> weights, Tensor encoding, bool ends_are_given,
              int64_t num_features, int64_t num_columns, bool /*sparse: for the backward*/) {
    const Place place(ids);
    const Lookup what = check_lookup(stores, ids, offsets, weights, encoding, ends_are_given);
    STD_TORCH_CHECK(
        num_features == what.header.num_features && num_columns == what.header.num_columns,
        "num_features and num_columns are not the encoding's");
    const Tensor out = new_tensor(ids, {what.batch, num_columns}, ScalarType::Float);
    if (what.batch == 0) return out;
    const DeviceLimits device = device_limits();
    const ForwardPlan plan = plan_forward(what, device);
    std::optional<Tensor> memory;
    const PlanArgument argument = argument_of(plan.words, ids, place, memory);
    const Inputs inputs = bind_inputs(what);
    for (const PoolLaunch& each : plan.launches) {
        check_shared(each.shape.shared_bytes, device);
        pool(argument, inputs, each, pointer<float>(out), place.stream);
    }
    raise_reported();
    return out;
}

// The same as lookup; its gradient formula updates the wanted stores.
Tensor lookup_fused(Tensor /*anchor*/, std::vector<Tensor> stores, Tensor ids,
                    std::optional<Tensor> offsets, std::optional<Tensor> weights, Tensor encoding,
                    bool ends_are_given, int64_t num_features, int64_t num_columns,
                    std::vector<int64_t> /*wanted*/, std::vector<Tensor> /*first*/,
                    std::vector<Tensor> /*second*/, std::vector<Tensor> /*steps*/,
                    Tensor /*settings*/, int64_t /*kind*/) {
    return lookup(std::move(stores), std::move(ids), std::move(offsets), std::move(weights),
                  std::move(encoding), ends_are_given, num_features, num_columns, false);
}

// ----------------------------------------------------------------------------------- backward

// Everything that a backward pass holds until its last launch.
struct Pass {
    Place place;
    Tensor gradient;
    Lookup lookup;
    DeviceLimits device;
    BackwardPlan plan;
    std::optional<Tensor> memory;
    std::optional<Tensor> workspace;

    Pass(const Tensor& grad, const std::vector<Tensor>& stores, const Tensor& ids,
         const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
         const Tensor& encoding, bool ends_are_given)
        : place(ids),
          lookup(check_lookup(stores, ids, offsets, weights, encoding, ends_are_given)),
          device(device_limits()) {
        gradient = check_gradient(grad, ids, lookup);
    }

    Backward& backward() { return plan.backward; }

    // Finds the touches of the wanted stores, whose gradients go to the targets.
    void start(const Tensor& ids, const std::vector<int64_t>& wanted, std::vector<Target> targets,
               SinkKind sink) {
        plan = plan_backward(lookup, wanted, std::move(targets), sink);
        const PlanLayout& layout = plan.words.layout;
        STD_TORCH_CHECK(backward().layout.num_touches <= kMostTouches,
                        "more than 2^32 rows are touched in one call; use smaller batches");
        check_shared(touch_group_bytes(32, layout.most_probes), device);
        workspace = new_tensor(ids, {backward().layout.size}, ScalarType::Byte);
        backward().workspace = pointer<unsigned char>(*workspace);
        backward().gradient = pointer<float>(gradient);
        backward().plan = argument_of(plan.words, ids, place, memory);
        find_touches(backward(), device, place.stream);
        raise_reported();
    }
};

// EMBCOMPRESS_CUDA_BACKWARD=atomic adds dense gradients up in any order, which takes no sorting.
SinkKind dense_sink() {
    const char* choice = std::getenv("EMBCOMPRESS_CUDA_BACKWARD");
    const bool atomic = choice != nullptr && std::strcmp(choice, "atomic") == 0;
    return atomic ? SinkKind::kAtomic : SinkKind::kDense;
}

Target target_of(const StoreView& store, float* data) {
    return Target{data, nullptr, nullptr, store.rows, store.width, 0, 0.0f};
}

std::vector<Tensor> lookup_backward(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                                    std::optional<Tensor> offsets, std::optional<Tensor> weights,
                                    Tensor encoding, bool ends_are_given,
                                    std::vector<int64_t> wanted) {
    Pass pass(grad, stores, ids, offsets, weights, encoding, ends_are_given);
    check_wanted(pass.lookup, wanted);
    std::vector<Tensor> results;
    std::vector<Target> targets;
    for (const int64_t store : wanted) {
        const StoreView& view = pass.lookup.stores[store];
        Tensor dense = new_tensor(ids, {view.rows, view.width}, ScalarType::Float);
        fill_zero(pointer<float>(dense), view.rows * view.width * sizeof(float), pass.place.stream);
        targets.push_back(target_of(view, pointer<float>(dense)));
        results.push_back(dense);
    }
    if (pass.lookup.batch == 0) return results;
    pass.start(ids, wanted, targets, dense_sink());
    add_gradients(pass.backward(), pass.device, pass.place.stream);
    return results;
}

// Gradients of the touched rows: for each wanted store its row numbers, rising, and their values.
std::vector<Tensor> lookup_backward_sparse(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                                           std::optional<Tensor> offsets,
                                           std::optional<Tensor> weights, Tensor encoding,
                                           bool ends_are_given, std::vector<int64_t> wanted) {
    Pass pass(grad, stores, ids, offsets, weights, encoding, ends_are_given);
    check_wanted(pass.lookup, wanted);
    std::vector<Target> targets;
    for (const int64_t store : wanted) {
        targets.push_back(target_of(pass.lookup.stores[store], nullptr));
    }
    std::vector<int64_t> bounds(wanted.size() + 1, 0);
    if (pass.lookup.batch > 0) {
        pass.start(ids, wanted, targets, SinkKind::kCompact);
        add_gradients(pass.backward(), pass.device, pass.place.stream);
        count_touched_rows(pass.backward(), bounds, pass.place.stream);
        raise_reported();
    }
    std::vector<Tensor> results;
    for (size_t k = 0; k < wanted.size(); ++k) {
        const int64_t count = bounds[k + 1] - bounds[k], width = targets[k].width;
        results.push_back(new_tensor(ids, {count}, ScalarType::Long));
        results.push_back(new_tensor(ids, {count, width}, ScalarType::Float));
        copy_touched_rows(pass.backward(), bounds[k], count, width,
                          pointer<int64_t>(results[2 * k]), pointer<float>(results[2 * k + 1]),
                          pass.device, pass.place.stream);
    }
    return results;
}

Tensor lookup_backward_weights(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                               std::optional<Tensor> offsets, std::optional<Tensor> weights,
                               Tensor encoding, bool ends_are_given) {
    Pass pass(grad, stores, ids, offsets, weights, encoding, ends_are_given);
    const Tensor out = new_tensor(ids, {pass.lookup.num_ids}, ScalarType::Float);
    if (pass.lookup.batch == 0) return out;
    pass.start(ids, {}, {}, SinkKind::kDense);
    weights_gradient(pass.backward(), pointer<float>(out), pass.device, pass.place.stream);
    return out;
}

float adam_scale(const Optimizer& optimizer, int64_t step) {
    if (optimizer.kind != OptimizerKind::kAdam) return 0.0f;
    const double steps = static_cast<double>(step);
    const double bias1 = 1.0 - std::pow(static_cast<double>(optimizer.beta1), steps);
    const double bias2 = 1.0 - std::pow(static_cast<double>(optimizer.beta2), steps);
    return static_cast<float>(optimizer.learning_rate * std::sqrt(bias2) / bias1);
}

// The backward pass and the update of the touched rows in one, as on the CPU.
void lookup_backward_update(Tensor grad, std::vector<Tensor> stores, Tensor ids,
                            std::optional<Tensor> offsets, std::optional<Tensor> weights,
                            Tensor encoding, bool ends_are_given, std::vector<int64_t> wanted,
                            std::vector<Tensor> first, std::vector<Tensor> second,
                            std::vector<Tensor> steps, Tensor settings, int64_t kind) {
    Pass pass(grad, stores, ids, offsets, weights, encoding, ends_are_given);
    const Optimizer optimizer = read_optimizer(settings, kind);
    check_wanted(pass.lookup, wanted);
    check_states(optimizer, pass.lookup, ids, wanted, first, second, steps);
    std::vector<Target> targets;
    for (size_t k = 0; k < wanted.size(); ++k) {
        Target target = target_of(pass.lookup.stores[wanted[k]], pointer<float>(stores[wanted[k]]));
        if (has_first(optimizer.kind)) target.first = pointer<float>(first[k]);
        if (has_second(optimizer.kind)) target.second = pointer<float>(second[k]);
        target.adam_scale = adam_scale(optimizer, *pointer<int64_t>(steps[k]) + 1);
        targets.push_back(target);
    }
    if (pass.lookup.batch > 0) {
        pass.start(ids, wanted, targets, SinkKind::kUpdate);
        Backward& backward = pass.backward();
        backward.optimizer = {static_cast<int32_t>(optimizer.kind),
                              optimizer.learning_rate,
                              optimizer.epsilon,
                              optimizer.weight_decay,
                              optimizer.beta1,
                              optimizer.beta2};
        add_gradients(backward, pass.device, pass.place.stream);
        if (backward.sink == SinkKind::kCompact) {
            update_segments(backward, pass.device, pass.place.stream);
        }
    }
    for (size_t k = 0; k < wanted.size(); ++k) ++*pointer<int64_t>(steps[k]);
}

void raise_reported_on(Tensor on) {
    const Place place(on);
    raise_reported();
}

}  // namespace
}  // namespace cuda
}  // namespace embcompress

#if defined(EMBCOMPRESS_EMULATION)
STABLE_TORCH_LIBRARY_IMPL(embcompress, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(embcompress, CUDA, m) {
#endif
    m.impl("lookup", TORCH_BOX(&embcompress::cuda::lookup));
    m.impl("lookup_forward", TORCH_BOX(&embcompress::cuda::lookup));
    m.impl("lookup_backward", TORCH_BOX(&embcompress::cuda::lookup_backward));
    m.impl("lookup_backward_sparse", TORCH_BOX(&embcompress::cuda::lookup_backward_sparse));
    m.impl("lookup_backward_weights", TORCH_BOX(&embcompress::cuda::lookup_backward_weights));
    m.impl("lookup_backward_update", TORCH_BOX(&embcompress::cuda::lookup_backward_update));
    m.impl("lookup_fused", TORCH_BOX(&embcompress::cuda::lookup_fused));
    m.impl("raise_reported", TORCH_BOX(&embcompress::cuda::raise_reported_on));
}
