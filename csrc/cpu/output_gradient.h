// The gradient of the output, as the ids see it: before heads, of their sample, times what their
// vectors were multiplied by.

#pragma once

#include <memory>
#include <vector>

#include "head.h"
#include "uses.h"

namespace embcompress {

class OutputGradient {
  public:
    OutputGradient(const Lookup& lookup, const float* grad, int num_threads);

    const Lookup& lookup() const { return lookup_; }

    // (width,) gradient of a sample's vector of a feature, before the head.
    EMBCOMPRESS_INLINE const float* of_sample(int64_t feature, int64_t sample) const {
        return before_heads_[feature].data + sample * before_heads_[feature].stride;
    }
    // (out_width,) gradient of a sample's output of a feature.
    const float* after_head(int64_t feature, int64_t sample) const {
        return grad_ + sample * lookup_.header.num_columns + lookup_.features[feature].out_column;
    }

    // The sample of the id at a position among all ids.
    EMBCOMPRESS_INLINE int64_t sample(int64_t feature, int64_t position) const {
        return samples_ == nullptr ? position - feature * lookup_.batch : samples_[position];
    }

    // Whether an id's vector is multiplied by something before it is added up.
    bool has_coefficients(int64_t feature) const {
        return lookup_.weights != nullptr || lookup_.features[feature].pool == Pool::kMean;
    }
    // Per-sample weight, and 1 / count of a mean.
    EMBCOMPRESS_INLINE float coefficient(int64_t feature, int64_t position, int64_t sample) const {
        float value = lookup_.weights == nullptr
                          ? 1.0f
                          : load_float(lookup_.weights, lookup_.weights_dtype, position);
        if (lookup_.features[feature].pool == Pool::kMean) {
            value *= reciprocals_[feature * lookup_.batch + sample];
        }
        return value;
    }

  private:
    struct Part {
        const float* data;
        int64_t stride;
    };
    void find_samples(int num_threads);
    void find_reciprocals(int num_threads);
    void undo_heads(int num_threads);

    const Lookup& lookup_;
    const float* grad_;
    std::vector<Part> before_heads_;
    std::vector<std::unique_ptr<float[]>> buffers_;
    std::unique_ptr<uint32_t[]> samples_;  // nullptr: every bag has one id
    std::unique_ptr<float[]> reciprocals_;
};

}  // namespace embcompress
