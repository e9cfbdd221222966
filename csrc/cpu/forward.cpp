// Forward: address, prefetch, gather, combine and pool in one pass over blocks of ids.

#include <algorithm>
#include <cstring>

#include "head.h"
#include "pooling.h"

namespace embcompress {
namespace {

// A bag of more ids than this is cut into pieces of a fixed length, which are pooled in parallel
// and added up in order: the result does not depend on the number of threads.
constexpr int64_t kHugeBag = 16384;
constexpr int64_t kPiece = 4096;
// Below this many floats gathered a thread costs more than it gives.
constexpr int64_t kFloatsPerThread = 16384;

EMBCOMPRESS_INLINE ProbeRows rows_of(const RowBlock& rows, int first, int count) {
    return {rows.pointers(first), rows.scaled() ? rows.scales(first) : nullptr, count};
}

// Vectors of the ids [begin, end) of a block, `width` apart: its probes added in their order.
template <int kLanes>
EMBCOMPRESS_INLINE void add_overlapping(const RowBlock& rows, int begin, int end, int64_t width,
                                        float* vectors) {
    std::fill(vectors + begin * width, vectors + end * width, 0.0f);
    for (int t = 0; t < rows.num_probes(); ++t) {
        const Probe& probe = rows.probe(t);
        const ProbeRows one = rows_of(rows, t, 1);
        for (int i = begin; i < end; ++i) {
            float* out = vectors + i * width + probe.column;
            pool_probes<kLanes, false>(one, {i, i + 1, nullptr, false, 0, out}, probe.width);
        }
    }
}

// Pools the vectors of a block's ids; probes are combined per id, before.
template <int kLanes>
EMBCOMPRESS_INLINE void pool_ids(RowBlock& rows, const Feature& feature, Target target) {
    const int count = rows.num_probes();
    if (feature.combine == Combine::kMul) {
        pool_probes<kLanes, true>(rows_of(rows, 0, count), target, feature.width);
        return;
    }
    if (rows.overlapping()) {
        add_overlapping<kLanes>(rows, target.begin, target.end, feature.width, rows.vectors());
        const float* pointers[kBlock];
        for (int i = target.begin; i < target.end; ++i) {
            pointers[i] = rows.vectors() + i * feature.width;
        }
        pool_probes<kLanes, false>({pointers, nullptr, 1}, target, feature.width);
        return;
    }
    float* out = target.out;
    for (int t = 0, end; t < count; t = end) {
        end = rows.end_of_columns(t);
        target.out = out + rows.probe(t).column;
        pool_probes<kLanes, false>(rows_of(rows, t, end - t), target, rows.probe(t).width);
    }
}

EMBCOMPRESS_INLINE int64_t counted(const RowBlock& rows, int begin, int end) {
    int64_t count = 0;
    for (int i = begin; i < end; ++i) count += !rows.skipped(i);
    return count;
}

// Pools consecutive pieces of ids; piece b is [bounds(b), bounds(b + 1)) and goes to out(b).
// counts(b), where wanted, gets the number of ids that are not padding.
struct Pieces {
    const Lookup& lookup;
    RowBlock& rows;
    int64_t first;
    int64_t last;
    int64_t piece_length;  // 0: the bags of the lookup; else pieces of this length
    int64_t begin;         // of the pieces
    int64_t end;
    float* out;
    int64_t stride;
    int64_t* counts;  // nullptr: divide by the count here where the pool is a mean

    int64_t bound(int64_t piece) const {
        if (piece_length == 0) return lookup.offset(piece);
        return std::min(begin + piece * piece_length, end);
    }
};

EMBCOMPRESS_INLINE void load_weights(const Lookup& lookup, const RowBlock& rows, int64_t position,
                                     int n, float* weights) {
    for (int i = 0; i < n; ++i) {
        weights[i] =
            rows.skipped(i) ? 0.0f : load_float(lookup.weights, lookup.weights_dtype, position + i);
    }
}

EMBCOMPRESS_INLINE void finish_piece(const Pieces& pieces, int64_t piece, int64_t count,
                                     float* acc) {
    if (pieces.counts != nullptr) {
        pieces.counts[piece - pieces.first] = count;
    } else if (pieces.rows.feature().pool == Pool::kMean && count > 0) {
        const float divisor = static_cast<float>(count);
        for (int64_t c = 0; c < pieces.rows.feature().width; ++c) acc[c] /= divisor;
    }
}

// Whether the next n pieces are of one id each.
EMBCOMPRESS_INLINE bool are_single(const Pieces& pieces, int64_t piece, int64_t position, int n) {
    if (pieces.piece_length != 0 || piece + n > pieces.last) return false;
    if (pieces.lookup.offsets == nullptr) return true;
    if (pieces.bound(piece) != position || pieces.bound(piece + n) != position + n) return false;
    for (int i = 1; i < n; ++i) {
        if (pieces.bound(piece + i) != position + i) return false;
    }
    return true;
}

// Writes the vectors of the first n ids, each to a row of its own. Rows are fetched some ids ahead.
template <int kLanes>
EMBCOMPRESS_INLINE void write_ids_inline(RowBlock& rows, int n, const float* weights,
                                         int64_t stride, float* out) {
    const int ahead = rows.ids_ahead(), step = ahead / 2;
    for (int begin = 0; begin < n; begin += step) {
        const int end = std::min(begin + step, n);
        rows.fetch(end + ahead);
        pool_ids<kLanes>(rows, rows.feature(), {begin, end, weights, true, stride, out});
    }
}

// Not a part of pool_pieces, whose loops leave too few registers.
void write_ids(RowBlock& rows, int n, const float* weights, int64_t stride, float* out) {
    EMBCOMPRESS_WITH_LANES(write_ids_inline<lanes>(rows, n, weights, stride, out));
}

template <int kLanes>
EMBCOMPRESS_INLINE bool pool_pieces_inline(const Pieces& pieces) {
    RowBlock& rows = pieces.rows;
    const Feature& feature = rows.feature();
    float weights[kBlock];
    const bool weighted = pieces.lookup.weights != nullptr;
    bool valid = true;
    int64_t piece = pieces.first, count = 0;
    int64_t piece_begin = pieces.bound(piece);
    const int64_t last_position = pieces.bound(pieces.last);
    float* acc = pieces.out;
    int64_t position = piece_begin;
    while (piece < pieces.last) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, last_position - position));
        if (n > 0) {
            valid &= rows.load_ids(position, n);
            rows.find_all(n);
            if (weighted) load_weights(pieces.lookup, rows, position, n, weights);
        }
        const int64_t block_end = position + n;
        if (n > 0 && pieces.counts == nullptr && are_single(pieces, piece, position, n)) {
            write_ids(rows, n, weighted ? weights : nullptr, pieces.stride, acc);
            piece += n;
            acc += n * pieces.stride;
            piece_begin = position = block_end;
            continue;
        }
        while (piece < pieces.last) {
            const int64_t piece_end = pieces.bound(piece + 1);
            const int begin = static_cast<int>(std::max(piece_begin, position) - position);
            const int end = static_cast<int>(std::min(piece_end, block_end) - position);
            const bool start = piece_begin >= position;
            rows.fetch(std::max(begin, end) + rows.ids_ahead());
            pool_ids<kLanes>(
                rows, feature,
                {begin, std::max(begin, end), weighted ? weights : nullptr, start, 0, acc});
            if (feature.pool == Pool::kMean && end > begin) count += counted(rows, begin, end);
            if (piece_end > block_end) break;
            finish_piece(pieces, piece, count, acc);
            ++piece;
            acc += pieces.stride;
            piece_begin = piece_end;
            count = 0;
        }
        position = block_end;
    }
    return valid;
}

bool pool_pieces(const Pieces& pieces) {
    return EMBCOMPRESS_WITH_LANES(pool_pieces_inline<lanes>(pieces));
}

// A huge bag: its pieces in parallel, then their sum in order.
bool pool_huge_bag(const Lookup& lookup, const Feature& feature, int64_t bag, float* out,
                   int num_threads) {
    const int64_t begin = lookup.offset(bag), end = lookup.offset(bag + 1);
    const int64_t pieces = (end - begin + kPiece - 1) / kPiece;
    std::vector<float> partial(pieces * feature.width);
    std::vector<int64_t> counts(pieces);
    std::atomic<bool> valid{true};
    const int parts = static_cast<int>(std::min<int64_t>(num_threads, pieces));
    parallel(parts, [&](int part) {
        const int64_t first = pieces * part / parts, last = pieces * (part + 1) / parts;
        RowBlock rows(lookup, feature);
        const Pieces mine{lookup,        rows,
                          first,         last,
                          kPiece,        begin,
                          end,           partial.data() + first * feature.width,
                          feature.width, counts.data() + first};
        if (!pool_pieces(mine)) valid = false;
    });
    int64_t count = 0;
    std::fill(out, out + feature.width, 0.0f);
    for (int64_t piece = 0; piece < pieces; ++piece) {
        count += counts[piece];
        for (int64_t c = 0; c < feature.width; ++c) out[c] += partial[piece * feature.width + c];
    }
    if (feature.pool == Pool::kMean && count > 0) {
        for (int64_t c = 0; c < feature.width; ++c) out[c] /= static_cast<float>(count);
    }
    return valid;
}

bool is_huge(const Lookup& lookup, int64_t bag) {
    return lookup.offset(bag + 1) - lookup.offset(bag) > kHugeBag;
}

// Pools bags [begin, end) of one feature, but for huge ones.
bool pool_bags(const Lookup& lookup, RowBlock& rows, int64_t begin, int64_t end, float* out,
               int64_t stride) {
    bool valid = true;
    const bool some_are_huge = lookup.longest_bag > kHugeBag;
    for (int64_t bag = begin; bag < end;) {
        int64_t last = some_are_huge ? bag : end;
        while (last < end && !is_huge(lookup, last)) ++last;
        if (last > bag) {
            float* first_out = out + (bag - begin) * stride;
            valid &= pool_pieces({lookup, rows, bag, last, 0, 0, 0, first_out, stride, nullptr});
        }
        bag = last < end ? last + 1 : last;
    }
    return valid;
}

void apply_head(const float* columns, const Feature& feature, const float* in, float* out,
                int64_t out_stride, int64_t count) {
    const Product product{in,   feature.width, 1,     columns,       feature.out_width,
                          out,  out_stride,    count, feature.width, feature.out_width,
                          false};
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
                                       int n, float* out, int64_t stride) {
    const Feature& feature = rows.feature();
    const bool valid = rows.load_ids(position, n);
    rows.find_rows(0, n);
    rows.point_to_converted(0, n);
    for (int begin = 0; begin < n; begin += kRowsAhead / 2) {
        const int end = std::min(begin + kRowsAhead / 2, n);
        rows.convert(0, begin, end, n);
        multiply<kLanes, true>({nullptr, 0, 1, columns, feature.out_width, out + begin * stride,
                                stride, end - begin, feature.width, feature.out_width, false,
                                rows.pointers(0) + begin});
    }
    return valid;
}

bool map_ids(RowBlock& rows, const float* columns, int64_t position, int n, float* out,
             int64_t stride) {
    return EMBCOMPRESS_WITH_LANES(map_ids_inline<lanes>(rows, columns, position, n, out, stride));
}

// Pools bags of a feature with a head, a block at a time, into `pooled`.
bool pool_and_map(const Lookup& lookup, RowBlock& rows, const float* columns, int64_t begin,
                  int64_t end, float* pooled, float* out) {
    bool valid = true;
    const Feature& feature = rows.feature();
    const int64_t stride = lookup.header.num_columns;
    const bool direct = reads_converted_rows(lookup, rows);
    for (int64_t bag = begin; bag < end; bag += kBlock) {
        const int64_t last = std::min<int64_t>(bag + kBlock, end), position = lookup.offset(bag);
        const int n = static_cast<int>(last - bag);
        float* first_out = out + (bag - begin) * stride;
        const Pieces bags{lookup, rows, bag, last, 0, 0, 0, pooled, feature.width, nullptr};
        if (direct && are_single(bags, bag, position, n)) {
            valid &= map_ids(rows, columns, position, n, first_out, stride);
        } else {
            valid &= pool_bags(lookup, rows, bag, last, pooled, feature.width);
            apply_head(columns, feature, pooled, first_out, stride, n);
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
                  int64_t end, float* pooled, float* out) {
    bool valid = true;
    const int64_t stride = lookup.header.num_columns;
    if (lookup.header.num_features > 1) prefetch_output(lookup, begin, end, out);
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        rows.use(lookup.features[f]);
        float* first_out = out + begin * stride + lookup.features[f].out_column;
        const int64_t first = f * lookup.batch + begin, last = f * lookup.batch + end;
        if (heads.has(f)) {
            valid &= pool_and_map(lookup, rows, heads.columns(f), first, last, pooled, first_out);
        } else {
            valid &= pool_bags(lookup, rows, first, last, first_out, stride);
        }
    }
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

template <typename Id>
EMBCOMPRESS_INLINE Lengths lengths_between(const void* offsets, int64_t count, int64_t num_ids) {
    const Id* ends = static_cast<const Id*>(offsets);
    int64_t shortest = num_ids, longest = 0;
    for (int64_t i = 1; i < count; ++i) {
        // Damaged offsets may be any numbers: their difference wraps.
        const int64_t length = static_cast<int64_t>(static_cast<uint64_t>(ends[i]) -
                                                    static_cast<uint64_t>(ends[i - 1]));
        shortest = std::min(shortest, length);
        longest = std::max(longest, length);
    }
    return {shortest, longest};
}

EMBCOMPRESS_CLONES Lengths lengths_of_64(const void* offsets, int64_t count, int64_t num_ids) {
    return lengths_between<int64_t>(offsets, count, num_ids);
}

EMBCOMPRESS_CLONES Lengths lengths_of_32(const void* offsets, int64_t count, int64_t num_ids) {
    return lengths_between<int32_t>(offsets, count, num_ids);
}

}  // namespace

Lengths bag_lengths(const Lookup& lookup) {
    Lengths lengths = lookup.ids_are_32_bit
                          ? lengths_of_32(lookup.offsets, lookup.num_offsets, lookup.num_ids)
                          : lengths_of_64(lookup.offsets, lookup.num_offsets, lookup.num_ids);
    const int64_t bags = lookup.header.num_features * lookup.batch;
    if (bags > 0 && lookup.num_offsets == bags) {  // the end of the last one was left out
        const int64_t last = lookup.num_ids - lookup.offset(bags - 1);
        lengths.shortest = std::min(lengths.shortest, last);
        lengths.longest = std::max(lengths.longest, last);
    }
    return lengths;
}

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
    const int64_t step = lookup.header.num_features > 1 ? kBlock / 2 : lookup.batch;
    const Heads heads(lookup);
    std::atomic<bool> valid{true};
    parallel(parts, [&](int part) {
        RowBlock rows(lookup);
        std::vector<float> pooled(heads.widest() * kBlock);
        const int64_t last = first_sample(lookup, part + 1, parts);
        for (int64_t begin = first_sample(lookup, part, parts); begin < last; begin += step) {
            const int64_t end = std::min(begin + step, last);
            if (!pool_samples(lookup, rows, heads, begin, end, pooled.data(), out)) valid = false;
        }
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
        if (heads.has(f)) apply_head(heads.columns(f), feature, target, row, feature.out_width, 1);
    }
    return valid;
}

bool pool_before_head(const Lookup& lookup, int64_t feature, int64_t begin, int64_t end,
                      float* out) {
    const Feature& which = lookup.features[feature];
    const int64_t first = feature * lookup.batch;
    RowBlock rows(lookup, which);
    bool valid = pool_bags(lookup, rows, first + begin, first + end, out, which.width);
    for (int64_t bag = begin; bag < end && lookup.longest_bag > kHugeBag; ++bag) {
        if (!is_huge(lookup, first + bag)) continue;
        float* row = out + (bag - begin) * which.width;
        valid &= pool_huge_bag(lookup, which, first + bag, row, 1);
    }
    return valid;
}

}  // namespace embcompress
