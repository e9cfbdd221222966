// What the backward pass knows of every id before it adds anything up.

#include "output_gradient.h"

#include <limits>
#include <stdexcept>

namespace embcompress {
namespace {

constexpr int64_t kBagsPerThread = 1024;

int parts_of(int64_t count, int num_threads) {
    return static_cast<int>(std::clamp<int64_t>(count / kBagsPerThread, 1, num_threads));
}

// gradient of the vectors = transposed head * gradient of the output
void undo_head(const float* head, const Feature& feature, const float* in, int64_t in_stride,
               float* out, int64_t count) {
    const Product product{in,
                          in_stride,
                          1,
                          head,
                          feature.width,
                          out,
                          feature.width,
                          count,
                          feature.out_width,
                          feature.width,
                          false};
    EMBCOMPRESS_WITH_LANES(multiply<lanes>(product));
}

}  // namespace

OutputGradient::OutputGradient(const Lookup& lookup, const float* grad, int num_threads)
    : lookup_(lookup), grad_(grad) {
    if (lookup.offsets != nullptr) find_samples(num_threads);
    bool has_means = false;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        has_means |= lookup.features[f].pool == Pool::kMean;
    }
    if (has_means) find_reciprocals(num_threads);
    undo_heads(num_threads);
}

void OutputGradient::find_samples(int num_threads) {
    if (lookup_.batch > std::numeric_limits<uint32_t>::max()) {
        throw std::runtime_error("more than 2**32 bags of a feature: split the batch");
    }
    samples_.reset(new uint32_t[lookup_.num_ids]);
    const int64_t bags = lookup_.header.num_features * lookup_.batch;
    const int parts = parts_of(bags, num_threads);
    parallel(parts, [&](int part) {
        for (int64_t bag = bags * part / parts; bag < bags * (part + 1) / parts; ++bag) {
            const uint32_t sample = static_cast<uint32_t>(bag % lookup_.batch);
            std::fill(samples_.get() + lookup_.offset(bag),
                      samples_.get() + lookup_.offset(bag + 1), sample);
        }
    });
}

void OutputGradient::find_reciprocals(int num_threads) {
    const int64_t bags = lookup_.header.num_features * lookup_.batch;
    reciprocals_.reset(new float[bags]);
    const int parts = parts_of(bags, num_threads);
    parallel(parts, [&](int part) {
        for (int64_t bag = bags * part / parts; bag < bags * (part + 1) / parts; ++bag) {
            const int64_t padding = lookup_.features[bag / lookup_.batch].padding_idx;
            int64_t count = lookup_.offset(bag + 1) - lookup_.offset(bag);
            for (int64_t p = lookup_.offset(bag); padding >= 0 && p < lookup_.offset(bag + 1);
                 ++p) {
                count -= lookup_.id(p) == padding;
            }
            reciprocals_[bag] = 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
        }
    });
}

void OutputGradient::undo_heads(int num_threads) {
    const int64_t stride = lookup_.header.num_columns, batch = lookup_.batch;
    const int parts = parts_of(batch, num_threads);
    for (int64_t f = 0; f < lookup_.header.num_features; ++f) {
        const Feature& feature = lookup_.features[f];
        const float* after = grad_ + feature.out_column;
        if (feature.head_store < 0) {
            before_heads_.push_back({after, stride});
            continue;
        }
        const std::vector<float> head = load_head(lookup_, feature, false);
        buffers_.emplace_back(new float[batch * feature.width]);
        float* before = buffers_.back().get();
        parallel(parts, [&](int part) {
            const int64_t begin = batch * part / parts, end = batch * (part + 1) / parts;
            undo_head(head.data(), feature, after + begin * stride, stride,
                      before + begin * feature.width, end - begin);
        });
        before_heads_.push_back({before, feature.width});
    }
}

}  // namespace embcompress
