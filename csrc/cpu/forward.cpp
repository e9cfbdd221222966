// Forward: the features of a batch, sample by sample, each with its head.

#include <algorithm>
#include <optional>
#include <utility>

#include "bags.h"
#include "head.h"
#include "output.h"

namespace embcompress {
namespace {

// Below this many floats gathered a thread costs more than it gives.
constexpr int64_t kFloatsPerThread = 16384;

void apply_head(const float* columns, const Feature& feature, const float* in, int64_t count,
                const OutputRows& out) {
    const Product product{in,        feature.width, 1,           columns,       feature.out_width,
                          out.first, out.stride,    count,       feature.width, feature.out_width,
                          false,     nullptr,       out.streamed};
    EMBCOMPRESS_WITH_LANES(multiply<lanes>(product));
}

// The heads of all features, and room for the vectors that they are applied to.
class Heads {
  public:
    explicit Heads(const Lookup& lookup) {
        for (int64_t f = 0; f < lookup.header.num_features; ++f) {
            const Feature& feature = lookup.features[f];
            if (feature.head_store < 0) continue;
            columns_.resize(lookup.header.num_features);
            columns_[f] = load_head(lookup, feature, true);
            widest_ = std::max(widest_, feature.width);
        }
    }
    bool has(int64_t feature) const { return !columns_.empty() && !columns_[feature].empty(); }
    const float* columns(int64_t feature) const { return columns_[feature].data(); }
    int64_t widest() const { return widest_; }

  private:
    std::vector<std::vector<float>> columns_;
    int64_t widest_ = 0;
};

// Whether the vector of an id is a converted row as it is.
bool reads_converted_rows(const Lookup& lookup, const RowBlock& rows) {
    return rows.num_probes() == 1 && rows.is_converted(0) && !rows.scaled() &&
           lookup.weights == nullptr && rows.probe(0).width == rows.feature().width;
}

// Applies the head to the rows of a block's n ids, each a bag of its own: a few ids at a time,
// while further rows are on their way. False for an id outside.
template <int kLanes>
EMBCOMPRESS_INLINE bool map_ids_inline(RowBlock& rows, const float* columns, int64_t position,
                                       int n, const OutputRows& out) {
    const Feature& feature = rows.feature();
    const bool valid = rows.load_ids(position, n);
    rows.find_rows(0, n);
    rows.point_to_converted(0, n);
    for (int begin = 0; begin < n; begin += kRowsAhead / 2) {
        const int end = std::min(begin + kRowsAhead / 2, n);
        rows.convert(0, begin, end, n);
        multiply<kLanes, true>({nullptr, 0, 1, columns, feature.out_width, out.from(begin).first,
                                out.stride, end - begin, feature.width, feature.out_width, false,
                                rows.pointers(0) + begin, out.streamed});
    }
    return valid;
}

bool map_ids(RowBlock& rows, const float* columns, int64_t position, int n, const OutputRows& out) {
    return EMBCOMPRESS_WITH_LANES(map_ids_inline<lanes>(rows, columns, position, n, out));
}

// Pools bags of a feature with a head, a block at a time, into `pooled`.
bool pool_and_map(const Lookup& lookup, RowBlock& rows, const float* columns, int64_t begin,
                  int64_t end, float* pooled, const OutputRows& out) {
    bool valid = true;
    const Feature& feature = rows.feature();
    const bool direct = reads_converted_rows(lookup, rows);
    for (int64_t bag = begin; bag < end; bag += kBlock) {
        const int64_t last = std::min<int64_t>(bag + kBlock, end), position = lookup.offset(bag);
        const int n = static_cast<int>(last - bag);
        const OutputRows mine = out.from(bag - begin);
        if (direct && are_single(lookup, bag, position, n)) {
            valid &= map_ids(rows, columns, position, n, mine);
        } else {
            valid &= pool_bags(lookup, rows, bag, last, {pooled, feature.width, false});
            apply_head(columns, feature, pooled, n, mine);
        }
    }
    return valid;
}

// Features write pieces of the output's rows, a stride apart, which no hardware foresees.
void prefetch_output(const Lookup& lookup, int64_t begin, int64_t end, float* out) {
    const float* last = out + end * lookup.header.num_columns;
    for (const float* line = out + begin * lookup.header.num_columns; line < last; line += 16) {
        __builtin_prefetch(line, 1);
    }
}

// Pools samples [begin, end) of the batch for every feature: the output is written row by row.
bool pool_samples(const Lookup& lookup, RowBlock& rows, const Heads& heads, int64_t begin,
                  int64_t end, float* pooled, const OutputRows& out) {
    bool valid = true;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        rows.use(lookup.features[f]);
        OutputRows mine = out.from(begin);
        mine.first += lookup.features[f].out_column;
        const int64_t first = f * lookup.batch + begin, last = f * lookup.batch + end;
        if (heads.has(f)) {
            valid &= pool_and_map(lookup, rows, heads.columns(f), first, last, pooled, mine);
        } else {
            valid &= pool_bags(lookup, rows, first, last, mine);
        }
    }
    return valid;
}

// The same where every bag has one id and no feature a head. Before the vectors of a block are
// written, the rows of the next one are found and fetched: so memory is always busy.
bool write_samples(const Lookup& lookup, RowBlock& one, RowBlock& other, int64_t begin, int64_t end,
                   const OutputRows& out) {
    RowBlock *rows = &one, *next = &other;
    bool valid = true;
    int64_t position = 0;
    int n = 0;
    OutputRows target{};
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        for (int64_t sample = begin; sample < end; sample += kBlock) {
            const int64_t next_position = f * lookup.batch + sample;
            const int count = static_cast<int>(std::min<int64_t>(kBlock, end - sample));
            if (!next->is_of(lookup.features[f])) next->use(lookup.features[f]);
            valid &= find_block(*next, next_position, count);
            if (n > 0) write_block(lookup, *rows, position, n, target);
            std::swap(rows, next);
            target = out.from(sample);
            target.first += lookup.features[f].out_column;
            position = next_position;
            n = count;
        }
    }
    if (n > 0) write_block(lookup, *rows, position, n, target);
    return valid;
}

// The sample before which a share of the ids and bags of the first feature lies. Threads take
// ranges of samples, the same ones whenever bags are alike: so the output's lines stay in the cache
// of the thread that wrote them the last time.
int64_t first_sample(const Lookup& lookup, int part, int parts) {
    const auto work = [&](int64_t sample) { return lookup.offset(sample) + sample; };
    const int64_t share = work(lookup.batch) * part / parts;
    int64_t low = 0, high = lookup.batch;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (work(middle) < share) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace

bool lookup_forward(const Lookup& lookup, float* out, int num_threads) {
    const int64_t bags = lookup.header.num_features * lookup.batch;
    const int64_t work = lookup.num_ids + bags;
    int64_t width = 0;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        width = std::max(width, lookup.features[f].width * lookup.features[f].num_probes);
    }
    const int parts = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(num_threads, work * width / kFloatsPerThread)));
    // Few samples at once, so that the output's rows stay in the cache between features.
    const bool has_many = lookup.header.num_features > 1;
    const int64_t step = has_many ? kBlock / 2 : lookup.batch;
    const Heads heads(lookup);
    const OutputRows all{out, lookup.header.num_columns, is_streamed(lookup, out)};
    const bool are_ids = lookup.offsets == nullptr && heads.widest() == 0;
    std::atomic<bool> valid{true};
    parallel(parts, [&](int part) {
        RowBlock rows(lookup);
        std::optional<RowBlock> other;
        if (are_ids) other.emplace(lookup);
        std::vector<float> pooled(heads.widest() * kBlock);
        const int64_t last = first_sample(lookup, part + 1, parts);
        for (int64_t begin = first_sample(lookup, part, parts); begin < last; begin += step) {
            const int64_t end = std::min(begin + step, last);
            if (has_many && !all.streamed) prefetch_output(lookup, begin, end, out);
            if (!(are_ids ? write_samples(lookup, rows, *other, begin, end, all)
                          : pool_samples(lookup, rows, heads, begin, end, pooled.data(), all))) {
                valid = false;
            }
        }
        if (all.streamed) end_streaming();
    });
    if (lookup.longest_bag <= kHugeBag) return valid;
    std::vector<float> pooled(heads.widest());
    for (int64_t bag = 0; bag < bags; ++bag) {
        if (!is_huge(lookup, bag)) continue;
        const int64_t f = bag / lookup.batch;
        const Feature& feature = lookup.features[f];
        float* row = out + (bag % lookup.batch) * lookup.header.num_columns + feature.out_column;
        float* target = heads.has(f) ? pooled.data() : row;
        if (!pool_huge_bag(lookup, feature, bag, target, num_threads)) valid = false;
        if (heads.has(f)) {
            apply_head(heads.columns(f), feature, target, 1, {row, feature.out_width, false});
        }
    }
    return valid;
}

bool pool_before_head(const Lookup& lookup, int64_t feature, int64_t begin, int64_t end,
                      float* out) {
    const Feature& which = lookup.features[feature];
    const int64_t first = feature * lookup.batch;
    RowBlock rows(lookup, which);
    bool valid = pool_bags(lookup, rows, first + begin, first + end, {out, which.width, false});
    for (int64_t bag = begin; bag < end && lookup.longest_bag > kHugeBag; ++bag) {
        if (!is_huge(lookup, first + bag)) continue;
        float* row = out + (bag - begin) * which.width;
        valid &= pool_huge_bag(lookup, which, first + bag, row, 1);
    }
    return valid;
}

}  // namespace embcompress
