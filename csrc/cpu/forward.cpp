// Forward: address, prefetch, gather, combine and pool in one pass over blocks of ids.

#include <algorithm>
#include <cstring>

#include "rows.h"

namespace embcompress {
namespace {

// A bag of more ids than this is cut into pieces of a fixed length, which are pooled in parallel
// and added up in order: the result does not depend on the number of threads.
constexpr int64_t kHugeBag = 16384;
constexpr int64_t kPiece = 4096;
constexpr int64_t kPrefetchedFloats = 8192;
// Below this many floats gathered a thread costs more than it gives.
constexpr int64_t kFloatsPerThread = 16384;

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are only ever passed between functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// `kLanes` floats in registers. A vector extension of GCC and clang: it becomes whatever the
// target has, and rounds as scalars do.
template <int kLanes>
struct Lanes {
    typedef float Type __attribute__((vector_size(kLanes * sizeof(float))));
};
template <>
struct Lanes<1> {
    typedef float Type;
};

template <typename V>
EMBCOMPRESS_INLINE V load_lanes(const float* from) {
    V lanes;
    std::memcpy(&lanes, from, sizeof(V));
    return lanes;
}

template <typename V>
EMBCOMPRESS_INLINE void store_lanes(float* to, V lanes) {
    std::memcpy(to, &lanes, sizeof(V));
}

// The rows of some probes, for every id of a block.
struct ProbeRows {
    const float* const* pointers;  // of the first probe; the next one's are kBlock further
    const float* scales;           // likewise; nullptr: none of them is scaled
    int count;
};

// Columns [column, column + lanes) of id number i, its probes combined. kProbes is their number,
// unscaled, or 0 where neither is known.
template <typename V, bool kMul, int kProbes>
EMBCOMPRESS_INLINE V combine_lanes(const ProbeRows& rows, int i, int64_t column) {
    const int count = kProbes == 0 ? rows.count : kProbes;
    V value = load_lanes<V>(rows.pointers[i] + column);
    if (kProbes == 0 && rows.scales != nullptr) value *= rows.scales[i];
    for (int t = 1; t < count; ++t) {
        V next = load_lanes<V>(rows.pointers[t * kBlock + i] + column);
        if (kProbes == 0 && rows.scales != nullptr) next *= rows.scales[t * kBlock + i];
        value = kMul ? value * next : value + next;
    }
    return value;
}

// What becomes of a block's vectors: ids [begin, end) are added to `out` (to zero where `start`),
// or id number i is written to out + i * stride. Weights are of the ids, or nullptr.
struct Target {
    int begin;
    int end;
    const float* weights;
    bool start;
    int64_t stride;  // 0: the ids are added up
    float* out;
};

// kVectors vectors of kLanes columns, from `column` on. Sums run over ids in order, so the width
// of the vectors changes no bit.
template <int kLanes, int kVectors, bool kMul, int kProbes>
EMBCOMPRESS_INLINE void pool_lanes(const ProbeRows& rows, const Target& target, int64_t column) {
    typedef typename Lanes<kLanes>::Type V;
    float* out = target.out + column;
    if (target.stride != 0) {
        for (int i = target.begin; i < target.end; ++i) {
            float* to = out + i * target.stride;
            for (int v = 0; v < kVectors; ++v) {
                V value = combine_lanes<V, kMul, kProbes>(rows, i, column + v * kLanes);
                if (target.weights != nullptr) value *= target.weights[i];
                store_lanes(to + v * kLanes, value);
            }
        }
        return;
    }
    V sums[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        sums[v] = target.start ? V{} : load_lanes<V>(out + v * kLanes);
    }
    for (int i = target.begin; i < target.end; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            V value = combine_lanes<V, kMul, kProbes>(rows, i, column + v * kLanes);
            if (target.weights != nullptr) value *= target.weights[i];
            sums[v] += value;
        }
    }
    for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kLanes, sums[v]);
}

template <bool kMul, int kProbes>
EMBCOMPRESS_INLINE void pool_columns(const ProbeRows& rows, const Target& target, int64_t width) {
    int64_t c = 0;
    for (; c + 64 <= width; c += 64) pool_lanes<16, 4, kMul, kProbes>(rows, target, c);
    for (; c + 16 <= width; c += 16) pool_lanes<16, 1, kMul, kProbes>(rows, target, c);
    for (; c + 4 <= width; c += 4) pool_lanes<4, 1, kMul, kProbes>(rows, target, c);
    for (; c < width; ++c) pool_lanes<1, 1, kMul, kProbes>(rows, target, c);
}

template <bool kMul>
EMBCOMPRESS_INLINE void pool_probes(const ProbeRows& rows, const Target& target, int64_t width) {
    if (rows.scales != nullptr) {
        pool_columns<kMul, 0>(rows, target, width);
    } else if (rows.count == 1) {
        pool_columns<false, 1>(rows, target, width);
    } else if (rows.count == 2) {
        pool_columns<kMul, 2>(rows, target, width);
    } else {
        pool_columns<kMul, 0>(rows, target, width);
    }
}

// Pools the vectors of a block's ids; probes are combined per id, before.
EMBCOMPRESS_INLINE void pool_ids(const RowBlock& rows, const Feature& feature, Target target) {
    const auto probes = [&](int first, int count) {
        return ProbeRows{rows.pointers(first), rows.scaled() ? rows.scales(first) : nullptr, count};
    };
    const int count = rows.num_probes();
    if (feature.combine == Combine::kMul) {
        pool_probes<true>(probes(0, count), target, feature.width);
    } else if (feature.combine == Combine::kSum) {
        pool_probes<false>(probes(0, count), target, feature.width);
    } else {
        float* out = target.out;
        for (int t = 0; t < count; ++t) {
            target.out = out + rows.probe(t).column;
            pool_probes<false>(probes(t, 1), target, rows.probe(t).width);
        }
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

// Ids of a block: as many as have their rows in the first-level cache between prefetch and use.
EMBCOMPRESS_INLINE int64_t ids_at_once(const Feature& feature) {
    const int64_t probes = feature.combine == Combine::kConcat ? 1 : feature.num_probes;
    return std::clamp<int64_t>(kPrefetchedFloats / (feature.width * probes), 16, kBlock);
}

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
    const int64_t most = ids_at_once(feature);
    while (piece < pieces.last) {
        const int n = static_cast<int>(std::min(most, last_position - position));
        if (n > 0) {
            valid &= rows.load_ids(position, n);
            rows.find_all(n);
            if (weighted) load_weights(pieces.lookup, rows, position, n, weights);
        }
        const int64_t block_end = position + n;
        if (n > 0 && pieces.counts == nullptr && are_single(pieces, piece, position, n)) {
            pool_ids(rows, feature, {0, n, weighted ? weights : nullptr, true, pieces.stride, acc});
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
            pool_ids(rows, feature,
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

EMBCOMPRESS_CLONES bool pool_pieces(const Pieces& pieces) { return pool_pieces_inline(pieces); }

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
bool pool_bags(const Lookup& lookup, RowBlock& rows, int64_t begin, int64_t end, float* out) {
    bool valid = true;
    const int64_t stride = lookup.header.num_columns;
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

// Features write pieces of the output's rows, a stride apart, which no hardware foresees.
void prefetch_output(const Lookup& lookup, int64_t begin, int64_t end, float* out) {
    const float* last = out + end * lookup.header.num_columns;
    for (const float* line = out + begin * lookup.header.num_columns; line < last; line += 16) {
        __builtin_prefetch(line, 1);
    }
}

// Pools samples [begin, end) of the batch for every feature: the output is written row by row.
bool pool_samples(const Lookup& lookup, RowBlock& rows, int64_t begin, int64_t end, float* out) {
    bool valid = true;
    if (lookup.header.num_features > 1) prefetch_output(lookup, begin, end, out);
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        rows.use(lookup.features[f]);
        float* first_out = out + begin * lookup.header.num_columns + lookup.features[f].out_column;
        const int64_t first = f * lookup.batch;
        valid &= pool_bags(lookup, rows, first + begin, first + end, first_out);
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
    std::atomic<bool> valid{true};
    parallel(parts, [&](int part) {
        RowBlock rows(lookup);
        const int64_t last = first_sample(lookup, part + 1, parts);
        for (int64_t begin = first_sample(lookup, part, parts); begin < last; begin += step) {
            const int64_t end = std::min(begin + step, last);
            if (!pool_samples(lookup, rows, begin, end, out)) valid = false;
        }
    });
    if (lookup.longest_bag <= kHugeBag) return valid;
    for (int64_t bag = 0; bag < bags; ++bag) {
        if (!is_huge(lookup, bag)) continue;
        const Feature& feature = lookup.features[bag / lookup.batch];
        float* acc = out + (bag % lookup.batch) * lookup.header.num_columns + feature.out_column;
        if (!pool_huge_bag(lookup, feature, bag, acc, num_threads)) valid = false;
    }
    return valid;
}

}  // namespace embcompress
