// Bags of one feature: address, prefetch, gather, combine and pool in one pass over blocks of ids.

#include "bags.h"

#include <algorithm>
#include <cstring>

#include "pooling.h"

namespace embcompress {
namespace {

constexpr int64_t kPiece = 4096;  // of a huge bag

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
    OutputRows out;
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

// Writes the vectors of the first n ids, each to a row of its own. Rows are fetched some ids ahead.
template <int kLanes>
EMBCOMPRESS_INLINE void write_vectors_inline(RowBlock& rows, int n, const float* weights,
                                             const OutputRows& out) {
    const int ahead = rows.ids_ahead(), step = ahead / 2;
    for (int begin = 0; begin < n; begin += step) {
        const int end = std::min(begin + step, n);
        rows.fetch(end + ahead);
        pool_ids<kLanes>(rows, rows.feature(),
                         {begin, end, weights, true, out.stride, out.first, out.streamed});
    }
}

// Not a part of pool_pieces, whose loops leave too few registers.
void write_vectors(RowBlock& rows, int n, const float* weights, const OutputRows& out) {
    EMBCOMPRESS_WITH_LANES(write_vectors_inline<lanes>(rows, n, weights, out));
}

template <int kLanes>
EMBCOMPRESS_INLINE bool find_block_inline(RowBlock& rows, int64_t position, int n) {
    const bool valid = rows.load_ids(position, n);
    rows.find_all(n);
    return valid;
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
    OutputRows out = pieces.out;
    int64_t position = piece_begin;
    while (piece < pieces.last) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, last_position - position));
        if (n > 0) {
            valid &= find_block_inline<kLanes>(rows, position, n);
            if (weighted) load_weights(pieces.lookup, rows, position, n, weights);
        }
        const int64_t block_end = position + n;
        const bool are_bags = pieces.piece_length == 0 && piece + n <= pieces.last;
        if (n > 0 && are_bags && are_single(pieces.lookup, piece, position, n)) {
            write_vectors(rows, n, weighted ? weights : nullptr, out);
            piece += n;
            out = out.from(n);
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
                {begin, std::max(begin, end), weighted ? weights : nullptr, start, 0, out.first});
            if (feature.pool == Pool::kMean && end > begin) count += counted(rows, begin, end);
            if (piece_end > block_end) break;
            finish_piece(pieces, piece, count, out.first);
            ++piece;
            out = out.from(1);
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

}  // namespace

bool find_block(RowBlock& rows, int64_t position, int n) {
    const bool valid = EMBCOMPRESS_WITH_LANES(find_block_inline<lanes>(rows, position, n));
    rows.fetch(rows.ids_ahead());
    return valid;
}

void write_block(const Lookup& lookup, RowBlock& rows, int64_t position, int n,
                 const OutputRows& out) {
    if (lookup.weights == nullptr) return write_vectors(rows, n, nullptr, out);
    float weights[kBlock];
    load_weights(lookup, rows, position, n, weights);
    write_vectors(rows, n, weights, out);
}

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
        const OutputRows mine{partial.data() + first * feature.width, feature.width, false};
        if (!pool_pieces(
                {lookup, rows, first, last, kPiece, begin, end, mine, counts.data() + first})) {
            valid = false;
        }
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

bool pool_bags(const Lookup& lookup, RowBlock& rows, int64_t begin, int64_t end,
               const OutputRows& out) {
    bool valid = true;
    const bool some_are_huge = lookup.longest_bag > kHugeBag;
    for (int64_t bag = begin; bag < end;) {
        int64_t last = some_are_huge ? bag : end;
        while (last < end && !is_huge(lookup, last)) ++last;
        if (last > bag) {
            valid &=
                pool_pieces({lookup, rows, bag, last, 0, 0, 0, out.from(bag - begin), nullptr});
        }
        bag = last < end ? last + 1 : last;
    }
    return valid;
}

}  // namespace embcompress
