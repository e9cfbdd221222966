// From a block of ids to pointers to float rows: addresses, codes, dequantization, scales.

#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "addresses.h"
#include "convert.h"
#include "lines.h"

namespace embcompress {

// Lines of a row that are prefetched; the hardware follows a longer row by itself.
constexpr int64_t kPrefetchFloats = 64;
constexpr int64_t kLinesAhead = 64;
constexpr int64_t kFewestAhead = 16;  // ids
constexpr int64_t kSmallStore = 32 << 10;

// The rows that a block of ids reads through every probe of a feature. One is made for a thread
// and used for one feature after another.
class RowBlock {
  public:
    explicit RowBlock(const Lookup& lookup) : lookup_(lookup) {
        int64_t most = 0, widest = 1, converted = 0, vectors = 0;
        bool scaled = false;
        for (int64_t f = 0; f < lookup.header.num_features; ++f) {
            const Feature& feature = lookup.features[f];
            int64_t width = 0;
            if (overlap(feature)) vectors = std::max(vectors, feature.width * kBlock);
            for (int64_t t = 0; t < feature.num_probes; ++t) {
                const Probe& probe = lookup.probes[feature.first_probe + t];
                widest = std::max(widest, probe.width);
                width += is_converted(probe) ? room_for(probe) : 0;
                scaled |= probe.scale.kind != ScaleKind::kNone;
            }
            most = std::max(most, feature.num_probes);
            converted = std::max(converted, width);
        }
        const int64_t addresses = most * kBlock, scales = scaled ? addresses : 0;
        const int64_t steps = 2 * steps_room(widest);
        const int64_t floats = scales + widest + converted + steps + vectors;
        memory_.reset(new char[(addresses + most) * 16 + floats * 4]);
        char* free = memory_.get();
        rows_ = take<int64_t>(free, addresses);
        pointers_ = take<const float*>(free, addresses);
        buffers_ = take<float*>(free, most);
        lines_ = take<int64_t>(free, most);
        scales_ = take<float>(free, scales);
        buffer_ = take<float>(free, converted);
        steps_ = take<float>(free, steps);
        vectors_ = take<float>(free, vectors);
        zeros_ = take<float>(free, widest);
        std::fill(zeros_, zeros_ + widest, 0.0f);
        // Unpacking computes with whole vectors of steps: what is behind a row must be tame
        // numbers, because subnormal ones take a hundred times as long.
        std::fill(steps_, steps_ + steps, 0.0f);
        num_scales_ = scales;
        std::fill(scales_, scales_ + scales, 1.0f);
    }

    RowBlock(const Lookup& lookup, const Feature& feature) : RowBlock(lookup) { use(feature); }

    // Turns to the ids of a feature.
    void use(const Feature& feature) {
        feature_ = &feature;
        probes_ = lookup_.probes + feature.first_probe;
        count_ = static_cast<int>(feature.num_probes);
        if (scaled_) std::fill(scales_, scales_ + num_scales_, 1.0f);
        scaled_ = false;
        overlapping_ = overlap(feature);
        float* buffer = buffer_;
        int64_t lines = 0;
        for (int t = 0; t < count_; ++t) {
            buffers_[t] = buffer;
            if (is_converted(probes_[t])) buffer += room_for(probes_[t]);
            scaled_ |= probes_[t].scale.kind != ScaleKind::kNone;
            lines_[t] = fetched_lines(probes_[t]);
            lines += lines_[t];
        }
        ids_ahead_ = static_cast<int>(
            std::clamp<int64_t>(kLinesAhead / std::max<int64_t>(lines, 1), kFewestAhead, kBlock));
    }

    const Feature& feature() const { return *feature_; }
    bool is_of(const Feature& feature) const { return feature_ == &feature; }
    int num_probes() const { return count_; }
    const Probe& probe(int t) const { return probes_[t]; }
    // The end of the probes from t on that have the columns of probe t.
    int end_of_columns(int t) const { return static_cast<int>(end_of_columns(probes_, t, count_)); }
    bool scaled() const { return scaled_; }
    // Whether the columns of a probe are in part those of probes before it.
    bool overlapping() const { return overlapping_; }
    // Room for the vectors of a block's ids, where probes overlap.
    float* vectors() { return vectors_; }
    const float* const* pointers(int t) const { return pointers_ + t * kBlock; }
    // Scales of the ids by probe t, where the feature has any.
    const float* scales(int t) const { return scales_ + t * kBlock; }
    float scale(int t, int i) const { return scaled_ ? scales(t)[i] : 1.0f; }
    // Row of each id in the store of probe t; -1 where absent or padding.
    const int64_t* rows(int t) const { return rows_ + t * kBlock; }
    const int64_t* ids() const { return ids_; }
    bool skipped(int i) const { return ids_[i] < 0; }

    // Reads the ids of a block and checks them; padding becomes -1. False for an id outside.
    EMBCOMPRESS_INLINE bool load_ids(int64_t position, int n) {
        return lookup_.ids_are_32_bit
                   ? check_ids(static_cast<const int32_t*>(lookup_.ids) + position, n)
                   : check_ids(static_cast<const int64_t*>(lookup_.ids) + position, n);
    }

    // Takes ids that were checked already.
    EMBCOMPRESS_INLINE void set_ids(const int64_t* ids, int n) {
        std::memcpy(ids_, ids, n * 8);
        has_skipped_ = true;
    }

    // Rows of probe t for the present ids.
    EMBCOMPRESS_INLINE void find_rows(int t, int n) {
        int64_t* rows = rows_ + t * kBlock;
        const Probe& probe = probes_[t];
        find_addresses(probe.address, feature_->num_embeddings, ids_, n, rows);
        if (probe.code.table.store >= 0) decode(probe.code, n, rows);
        if (probe.code.table.store < 0 && probe.offset == 0 && !has_skipped_) return;
        for (int i = 0; i < n; ++i) {
            rows[i] = ids_[i] < 0 || rows[i] < 0 ? -1 : rows[i] + probe.offset;
        }
    }

    // Pointers to the rows of probe t, after find_rows.
    EMBCOMPRESS_INLINE void find_pointers(int t, int n) {
        const Probe& probe = probes_[t];
        const int64_t* rows = rows_ + t * kBlock;
        const float** pointers = pointers_ + t * kBlock;
        const StoreView& store = lookup_.stores[probe.store];
        if (!is_converted(probe)) {
            const int64_t count = store.bytes / static_cast<int64_t>(sizeof(float));
            find_pointers_to({static_cast<const float*>(store.data), count, probe.stride}, zeros_,
                             rows, n, pointers);
        } else {
            point_to_converted(t, n);
            convert(t, 0, n, n);
        }
        find_scales(t, n);
    }

    // Pointers to where `convert` writes the rows of probe t, after find_rows.
    EMBCOMPRESS_INLINE void point_to_converted(int t, int n) {
        const int64_t* rows = rows_ + t * kBlock;
        const float** pointers = pointers_ + t * kBlock;
        for (int i = 0; i < n; ++i) {
            pointers[i] = rows[i] < 0 ? zeros_ : buffers_[t] + i * probes_[t].width;
        }
    }

    // Rows [begin, end) of the n of probe t, one range after the other from 0 on.
    EMBCOMPRESS_INLINE void convert(int t, int begin, int end, int n) {
        const int64_t* rows = rows_ + t * kBlock;
        convert_rows(lookup_, probes_[t], {rows, begin, end, n, buffers_[t]}, steps_);
    }

    bool is_converted(int t) const { return is_converted(probes_[t]); }

    // Pointers to the rows of every probe; `fetch` has then fetched nothing.
    EMBCOMPRESS_INLINE void find_all(int n) {
        for (int t = 0; t < count_; ++t) {
            find_rows(t, n);
            find_pointers(t, n);
        }
        found_ = n;
        fetched_ = 0;
    }

    // Scales of the present ids by probe t.
    void find_scales(int t, int n) {
        const Scale& scale = probes_[t].scale;
        if (scale.kind == ScaleKind::kNone) return;
        float* values = scales_ + t * kBlock;
        for (int i = 0; i < n; ++i) {
            values[i] = ids_[i] < 0 ? 0.0f : scale_of(lookup_, scale, ids_[i]);
        }
    }

    // Room for the steps and biases of a row, which `convert` uses, too.
    float* steps() { return steps_; }

    // Prefetches the rows of the ids before `end`, each once.
    EMBCOMPRESS_INLINE void fetch(int end) {
        end = std::min(end, found_);
        if (end <= fetched_) return;
        for (int t = 0; t < count_; ++t) fetch_rows(t, fetched_, end);
        fetched_ = end;
    }

    // Prefetches rows of probe t, after find_pointers.
    EMBCOMPRESS_INLINE void fetch_rows(int t, int begin, int end) const {
        const int64_t lines = lines_[t];
        const float* const* pointers = pointers_ + t * kBlock;
        if (lines == 0) return;
        const auto fetch_each = [&](auto count) EMBCOMPRESS_INLINED {
            for (int i = begin; i < end; ++i) {
                for (int64_t line = 0; line < count; ++line) {
                    __builtin_prefetch(pointers[i] + line * kLineFloats);
                }
            }
        };
        if (lines == 1) {
            fetch_each(std::integral_constant<int64_t, 1>{});
        } else if (lines == 4) {
            fetch_each(std::integral_constant<int64_t, 4>{});
        } else {
            fetch_each(lines);
        }
    }

    // Lines of a row of probe t that are worth to be prefetched.
    int64_t fetched_lines(int t) const { return lines_[t]; }

    // How many ids ahead of their use rows are fetched: as many as the processor has under way.
    int ids_ahead() const { return ids_ahead_; }

  private:
    bool is_converted(const Probe& probe) const {
        return lookup_.stores[probe.store].dtype != Dtype::kFloat32 ||
               probe.quantization.bits > 0 || is_sparse(probe);
    }

    // Lines of a row that are prefetched. A small store is in the first-level cache by itself.
    int64_t fetched_lines(const Probe& probe) const {
        if (is_converted(probe) || lookup_.stores[probe.store].bytes <= kSmallStore) return 0;
        return (std::min(probe.width, kPrefetchFloats) + kLineFloats - 1) / kLineFloats;
    }

    static int64_t end_of_columns(const Probe* probes, int64_t t, int64_t count) {
        int64_t end = t + 1;
        while (end < count && probes[end].column == probes[t].column &&
               probes[end].width == probes[t].width) {
            ++end;
        }
        return end;
    }

    bool overlap(const Feature& feature) const {
        if (feature.combine == Combine::kMul) return false;
        const Probe* probes = lookup_.probes + feature.first_probe;
        int64_t filled = 0;
        for (int64_t t = 0; t < feature.num_probes;
             t = end_of_columns(probes, t, feature.num_probes)) {
            if (probes[t].column < filled) return true;
            filled = probes[t].column + probes[t].width;
        }
        return false;
    }

    // The next of the arrays in `free`, the larger types first.
    template <typename T>
    static T* take(char*& free, int64_t count) {
        T* array = reinterpret_cast<T*>(free);
        free += count * sizeof(T);
        return array;
    }

    static int64_t room_for(const Probe& probe) { return probe.width * kBlock + kUnpacked; }

    template <typename Id>
    EMBCOMPRESS_INLINE bool check_ids(const Id* ids, int n) {
        const uint64_t limit = static_cast<uint64_t>(feature_->num_embeddings);
        const int64_t padding = feature_->padding_idx;
        int64_t outside = 0, skipped = 0;
        for (int i = 0; i < n; ++i) {
            const int64_t id = ids[i];
            const bool inside = static_cast<uint64_t>(id) < limit;
            outside |= !inside;
            skipped |= !inside || id == padding;
            ids_[i] = inside && id != padding ? id : -1;
        }
        has_skipped_ = skipped != 0;
        return outside == 0;
    }

    EMBCOMPRESS_INLINE void decode(const Code& code, int n, int64_t* rows) const {
        for (int i = 0; i < n; ++i) {
            if (ids_[i] >= 0) rows[i] = decode_row(lookup_, code, ids_[i], rows[i]);
        }
    }

    const Lookup& lookup_;
    const Feature* feature_ = nullptr;
    const Probe* probes_ = nullptr;
    int count_ = 0;
    bool scaled_ = false;
    bool overlapping_ = false;
    bool has_skipped_ = false;
    int found_ = 0;
    int fetched_ = 0;
    int ids_ahead_ = kBlock;
    int64_t ids_[kBlock];
    std::unique_ptr<char[]> memory_;  // of all the arrays: each of its own would cost a small batch
    int64_t* rows_;
    const float** pointers_;
    float** buffers_;
    int64_t* lines_;  // of a row of each probe that are prefetched
    float* scales_;   // nothing where no probe has a scale
    int64_t num_scales_;
    float* buffer_;  // rows that are not float32, converted
    float* steps_;   // and biases, of a row
    float* vectors_;
    float* zeros_;
};

}  // namespace embcompress
