// Gradients of stores. Ids are grouped by the rows they touch, and the gradients of the rows of a
// group are added up in one go, in the order of the batch. Stores that fit the first-level cache,
// and what touches one row alone or all of them (steps of a whole store, heads), are added up in
// pieces of the batch instead, whose length depends on the batch alone. So the number of threads
// changes no bit.

#include <algorithm>
#include <cstring>

#include "reducer.h"

namespace embcompress {
namespace {

constexpr int64_t kPiece = 4096;  // of ids, or of entries of one row
// Pieces of the batch: few of them, because each has a gradient of the whole store.
constexpr int64_t kShortestPiece = 1024;
constexpr int64_t kMostPieces = 16;
constexpr int64_t kUpdatesPerThread = 512;

void reduce_group(Reducer& reducer, const StoreGradient& gradient, const GroupedRows::Group& group,
                  Destination& destination, Sums* joint) {
    EMBCOMPRESS_WITH_LANES(reducer.reduce<lanes>(gradient, group, destination, joint));
}

void add_entries(Reducer& reducer, const StoreGradient& gradient, int64_t begin, int64_t end,
                 float* sums, Sums* joint) {
    EMBCOMPRESS_WITH_LANES(reducer.add<lanes>(gradient, begin, end, sums, joint));
}

bool add_batch(Reducer& reducer, const StoreGradient& gradient, const Source& source, int64_t begin,
               int64_t end, float* sums, uint8_t* touched) {
    return EMBCOMPRESS_WITH_LANES(
        reducer.add_batch<lanes>(gradient, source, begin, end, sums, touched));
}

EMBCOMPRESS_CLONES void update_range(const Updated& store, const int64_t* rows, const float* values,
                                     int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        if (i + 8 < end) store.prefetch(rows[i + 8]);
        store.update(rows[i], values + i * store.width);
    }
}

// A piece of the batch of one use, and what it adds to the whole store.
struct Piece {
    StoreGradient* gradient;
    const Source* source;
    int64_t begin;
    int64_t end;
    Sums sums;
};

void add_sums(StoreGradient& gradient, const Sums& sums, bool is_transposed) {
    const int64_t rows = gradient.store.rows, width = gradient.store.width;
    for (int64_t r = 0; r < rows; ++r) {
        if (!sums.touched[r]) continue;
        gradient.touched[r] = 1;
        for (int64_t c = 0; c < width; ++c) {
            gradient.sums[r * width + c] +=
                sums.values[is_transposed ? c * rows + r : r * width + c];
        }
    }
}

void add_joint_sums(const StoreGradient& gradient, const std::vector<Sums>& joint) {
    for (size_t k = 0; k < joint.size(); ++k) {
        StoreGradient* other = gradient.sources[k].joint;
        if (other != nullptr) add_sums(*other, joint[k], false);
    }
}

}  // namespace

struct StoreGradients::State {
    const Lookup& lookup;
    const OutputGradient output;
    const Touches touches;
    const int num_threads;
    std::vector<StoreGradient> stores;
    std::atomic<bool> valid{true};

    State(const Lookup& lookup, const float* grad, Touches touches, int num_threads)
        : lookup(lookup),
          output(lookup, grad, num_threads),
          touches(touches),
          num_threads(num_threads) {}

    bool shares_memory() const;
    bool add_piece(Piece& piece, RowBlock& block, Reducer& reducer) const;
    void add_pieces();
    void add_contributions_of_ids();
    bool may_update(size_t k) const;
    void group();
    void count_touched();
    void reduce_groups(const std::vector<GradientSink>& sinks);
    void reduce_huge(const StoreGradient& gradient, const GroupedRows::Group& group,
                     Destination& destination, Reducer& reducer);
    void deliver_sums(StoreGradient& gradient, const GradientSink& sink) const;
    int64_t most_probes() const;
};

// Whether tables hold one tensor as two of the wanted stores.
bool StoreGradients::State::shares_memory() const {
    for (const StoreGradient& one : stores) {
        for (const StoreGradient& other : stores) {
            if (&one != &other && one.store.data == other.store.data) return true;
        }
    }
    return false;
}

int64_t StoreGradients::State::most_probes() const {
    int64_t most = 1;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        most = std::max(most, lookup.features[f].num_probes);
    }
    return most;
}

bool StoreGradients::State::add_piece(Piece& piece, RowBlock& block, Reducer& reducer) const {
    piece.sums.values.assign(piece.gradient->sums.size(), 0.0f);
    piece.sums.touched.assign(piece.gradient->touched.size(), 0);
    const Source& source = *piece.source;
    float* sums = piece.sums.values.data();
    if (source.use.role == Role::kRows) {
        return add_batch(reducer, *piece.gradient, source, piece.begin, piece.end, sums,
                         piece.sums.touched.data());
    }
    std::fill(piece.sums.touched.begin(), piece.sums.touched.end(), uint8_t{1});
    if (source.use.role == Role::kHead) {
        return add_head_gradient(output, source.use.feature, piece.begin, piece.end, sums);
    }
    return add_contributions(output, source.use, piece.begin, piece.end, block,
                             sums + source.column, 0);
}

// Pieces of the batch in parallel, then their sum in order.
void StoreGradients::State::add_pieces() {
    std::vector<Piece> pieces;
    for (StoreGradient& gradient : stores) {
        for (const Source& source : gradient.summed) {
            const bool is_head = source.use.role == Role::kHead;
            const int64_t count =
                is_head ? lookup.batch : ids_of(lookup, source.use.feature).size();
            const int64_t length =
                std::max(kShortestPiece, (count + kMostPieces - 1) / kMostPieces);
            for (int64_t at = 0; at < count; at += length) {
                pieces.push_back({&gradient, &source, at, std::min(at + length, count), {}});
            }
        }
    }
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(num_threads, pieces.size())), [&](int) {
        RowBlock block(lookup);
        Reducer reducer(output, most_probes());
        for (size_t number = next++; number < pieces.size(); number = next++) {
            if (!add_piece(pieces[number], block, reducer)) valid = false;
        }
    });
    for (const Piece& piece : pieces) {
        add_sums(*piece.gradient, piece.sums, piece.source->use.role == Role::kHead);
    }
}

// What every id adds to the row it touches, where that is no gathered row.
void StoreGradients::State::add_contributions_of_ids() {
    struct Part {
        Source* source;
        int64_t begin;
        int64_t end;
    };
    std::vector<Part> parts;
    for (StoreGradient& gradient : stores) {
        for (Source& source : gradient.sources) {
            if (source.use.role == Role::kRows) continue;
            const int64_t count = ids_of(lookup, source.use.feature).size();
            source.added.assign(count * source.width, 0.0f);
            for (int64_t at = 0; at < count; at += kPiece) {
                parts.push_back({&source, at, std::min(at + kPiece, count)});
            }
        }
    }
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(num_threads, parts.size())), [&](int) {
        RowBlock block(lookup);
        for (size_t number = next++; number < parts.size(); number = next++) {
            const Part& part = parts[number];
            Source& source = *part.source;
            float* out = source.added.data() + part.begin * source.width;
            if (!add_contributions(output, source.use, part.begin, part.end, block, out,
                                   source.width)) {
                valid = false;
            }
        }
    });
}

// Sums are delivered when all else has been read; entries read factors, scales and steps before.
bool StoreGradients::State::may_update(size_t k) const {
    const StoreGradient& mine = stores[k];
    for (const StoreGradient& other : stores) {
        // Tables may hold one tensor as two stores.
        if (other.number != mine.number && other.store.data == mine.store.data) return false;
        for (const Source& source : other.sources) {
            if (mine.sums.empty() && reads(lookup, source, mine.number)) return false;
        }
    }
    return true;
}

// Stores that are most of the work are grouped by all threads, the others by one each.
void StoreGradients::State::group() {
    std::vector<std::vector<Use>> uses(stores.size());
    std::vector<int64_t> work(stores.size());
    int64_t total = 0;
    for (size_t k = 0; k < stores.size(); ++k) {
        for (const Source& source : stores[k].sources) {
            uses[k].push_back(source.use);
            work[k] += ids_of(lookup, source.use.feature).size();
        }
        total += work[k];
    }
    const auto group_one = [&](size_t k, int threads, RowBlock& block) {
        if (uses[k].empty()) return;
        StoreGradient& gradient = stores[k];
        if (!gradient.grouped.group(lookup, uses[k], gradient.store, threads, block)) valid = false;
        if (!valid || gradient.sums.empty()) return;
        for (const GroupedRows::Group& group : gradient.grouped.groups()) {
            for (int64_t at = group.begin; at < group.end; ++at) {
                gradient.touched[gradient.grouped.row(at)] = 1;
            }
        }
    };
    std::vector<size_t> small;
    RowBlock block(lookup);
    for (size_t k = 0; k < stores.size(); ++k) {
        if (2 * work[k] * num_threads > total) {
            group_one(k, num_threads, block);
        } else {
            small.push_back(k);
        }
    }
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(num_threads, small.size())), [&](int) {
        RowBlock own(lookup);
        for (size_t number = next++; number < small.size(); number = next++) {
            group_one(small[number], 1, own);
        }
    });
}

void StoreGradients::State::count_touched() {
    for (size_t k = 0; k < stores.size(); ++k) {
        if (!stores[k].sums.empty()) continue;
        if (touches == Touches::kCounted || !may_update(k)) {
            stores[k].grouped.count_touched(num_threads);
        }
    }
}

// A row of very many entries: pieces in parallel, then their sum in order.
void StoreGradients::State::reduce_huge(const StoreGradient& gradient,
                                        const GroupedRows::Group& group, Destination& destination,
                                        Reducer& reducer) {
    const int64_t count = group.size(), width = gradient.width();
    // Each piece may have a gradient of a whole small store.
    const int64_t length =
        gradient.has_joint() ? std::max(kPiece, (count + kMostPieces - 1) / kMostPieces) : kPiece;
    const int64_t pieces = (count + length - 1) / length;
    std::vector<float> partial(pieces * width);
    std::vector<std::vector<Sums>> joint(pieces);
    const int parts = static_cast<int>(std::min<int64_t>(num_threads, pieces));
    const auto add_piece = [&](Reducer& own, int64_t piece) {
        const int64_t begin = group.begin + piece * length;
        joint[piece] = joint_sums(gradient);
        add_entries(own, gradient, begin, std::min(begin + length, group.end),
                    partial.data() + piece * width, joint[piece].data());
    };
    std::atomic<int64_t> next{0};
    if (parts == 1) {
        for (int64_t piece = 0; piece < pieces; ++piece) add_piece(reducer, piece);
    } else {
        parallel(parts, [&](int) {
            Reducer own(output, most_probes());
            for (int64_t piece = next++; piece < pieces; piece = next++) add_piece(own, piece);
        });
    }
    destination.start(&group.first_row, 1, group.first_touched);
    float* sums = destination.sums(0);
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t c = 0; c < width; ++c) sums[c] += partial[piece * width + c];
        add_joint_sums(gradient, joint[piece]);
    }
    destination.finish();
}

void StoreGradients::State::reduce_groups(const std::vector<GradientSink>& sinks) {
    // Groups of one store, one after another, and what they add to other factors.
    struct Item {
        size_t k;
        size_t begin;
        size_t end;
        std::vector<Sums> joint;
    };
    const auto is_huge = [](const GroupedRows::Group& group) {
        return group.num_rows() == 1 && group.size() > kHugeRow;
    };
    std::vector<Item> items;
    for (size_t k = 0; k < stores.size(); ++k) {
        // As with pieces: few of them where each has a gradient of a whole small store.
        const size_t count = stores[k].grouped.groups().size();
        const size_t most = stores[k].has_joint() ? std::min<size_t>(count, kMostPieces) : count;
        for (size_t g = 0; g < most; ++g) {
            items.push_back({k, count * g / most, count * (g + 1) / most, {}});
        }
    }
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(num_threads, items.size())), [&](int) {
        Reducer reducer(output, most_probes());
        for (size_t number = next++; number < items.size(); number = next++) {
            Item& item = items[number];
            const StoreGradient& gradient = stores[item.k];
            Destination destination(lookup, gradient, sinks[item.k], reducer.room());
            item.joint = joint_sums(gradient);
            for (size_t g = item.begin; g < item.end; ++g) {
                const GroupedRows::Group& group = gradient.grouped.groups()[g];
                if (is_huge(group)) continue;
                reduce_group(reducer, gradient, group, destination, item.joint.data());
            }
        }
    });
    for (const Item& item : items) add_joint_sums(stores[item.k], item.joint);
    for (size_t k = 0; k < stores.size(); ++k) {
        for (const GroupedRows::Group& group : stores[k].grouped.groups()) {
            if (!is_huge(group)) continue;
            Reducer reducer(output, most_probes());
            Destination destination(lookup, stores[k], sinks[k], reducer.room());
            reduce_huge(stores[k], group, destination, reducer);
        }
    }
}

void StoreGradients::State::deliver_sums(StoreGradient& gradient, const GradientSink& sink) const {
    const int64_t width = gradient.width();
    std::vector<float> steps = steps_of(lookup, gradient);
    int64_t number = 0;
    for (int64_t row = 0; row < gradient.store.rows; ++row) {
        if (!gradient.touched[row]) continue;
        float* values = gradient.sums.data() + row * width;
        mask_row(lookup, gradient, row, steps.data(), values);
        if (sink.updated != nullptr) {
            sink.updated->update(row, values);
        } else if (sink.dense != nullptr) {
            for (int64_t c = 0; c < width; ++c) sink.dense[row * width + c] += values[c];
        } else {
            sink.rows[number] = row;
            std::copy(values, values + width, sink.values + number++ * width);
        }
    }
}

StoreGradients::StoreGradients(const Lookup& lookup, const float* grad,
                               const std::vector<int64_t>& wanted, Touches touches, int num_threads)
    : state_(new State(lookup, grad, touches, num_threads)) {
    state_->stores.reserve(wanted.size());
    for (const int64_t number : wanted) {
        state_->stores.push_back(gradient_of(state_->output, number));
    }
    if (touches == Touches::kUncounted && !state_->shares_memory()) {
        join_factors(lookup, state_->stores);
    }
}

StoreGradients::~StoreGradients() = default;

bool StoreGradients::prepare() {
    if (state_->lookup.num_ids == 0) return true;
    state_->add_pieces();
    if (state_->valid) state_->add_contributions_of_ids();
    if (state_->valid) state_->group();
    if (state_->valid) state_->count_touched();
    return state_->valid;
}

int64_t StoreGradients::num_touched(size_t k) const {
    if (state_->lookup.num_ids == 0) return 0;
    const StoreGradient& gradient = state_->stores[k];
    if (gradient.sums.empty()) return gradient.grouped.num_touched();
    return std::count(gradient.touched.begin(), gradient.touched.end(), 1);
}

bool StoreGradients::may_update(size_t k) const { return state_->may_update(k); }

void StoreGradients::reduce(const std::vector<GradientSink>& sinks) {
    if (state_->lookup.num_ids == 0) return;
    std::vector<GradientSink> targets = sinks;
    for (size_t k = 0; k < sinks.size(); ++k) {
        StoreGradient& gradient = state_->stores[k];
        if (!gradient.sums.empty()) targets[k] = GradientSink{gradient.sums.data()};
    }
    state_->reduce_groups(targets);
    for (size_t k = 0; k < sinks.size(); ++k) {
        StoreGradient& gradient = state_->stores[k];
        if (!gradient.sums.empty()) state_->deliver_sums(gradient, sinks[k]);
    }
}

void update_rows(const Updated& store, const int64_t* rows, const float* values, int64_t count,
                 int num_threads) {
    const int parts =
        static_cast<int>(std::clamp<int64_t>(count / kUpdatesPerThread, 1, num_threads));
    parallel(parts, [&](int part) {
        update_range(store, rows, values, count * part / parts, count * (part + 1) / parts);
    });
}

}  // namespace embcompress
