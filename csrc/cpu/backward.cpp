// Gradients of stores. Ids are sorted by the row they touch, and the gradient of every row is
// added up in one go, in the order of the batch: as forward pools the rows of a bag, backward pools
// the gradients of a row. Stores that fit the first-level cache, and what touches one row alone or
// all of them (steps of a whole store, heads), are added up in pieces of the batch instead, whose
// length depends on the batch alone. So the number of threads changes no bit.

#include <algorithm>
#include <cstring>

#include "contributions.h"
#include "gradients.h"
#include "sorted_rows.h"

namespace embcompress {
namespace {

constexpr int64_t kPiece = 4096;  // of ids, or of entries of one row
// Pieces of the batch: few of them, because each has a gradient of the whole store.
constexpr int64_t kShortestPiece = 1024;
constexpr int64_t kMostPieces = 16;
constexpr int64_t kSmallGradient = 16384;  // numbers
constexpr int64_t kUpdatesPerThread = 512;

// How the entries of a use become what is added to a row.
struct Source {
    Use use;
    const Feature* feature;
    const Probe* probe;
    int64_t first;             // position of the feature's first id
    std::vector<float> added;  // (ids, width), where the use is no row: what each id adds
    int64_t width;
    int64_t column;  // of the row, where the width begins
    bool is_product;
    bool has_coefficients;
};

struct StoreGradient {
    StoreView store;
    int64_t number;
    std::vector<Source> sources;  // uses whose rows are sorted
    std::vector<Source> summed;   // uses that are added up in pieces of the batch
    std::vector<float> sums;      // (rows, width) where there are any
    std::vector<uint8_t> touched;  // (rows,) likewise
    SortedRows sorted;
    const Probe* latents = nullptr;  // a probe of the store, where it is held as latents
    bool has_products = false;

    int64_t width() const { return store.width; }
};

// Gradients of latents go straight through, inside the codes' range.
EMBCOMPRESS_INLINE void mask_row(const Lookup& lookup, const StoreGradient& gradient, int64_t row,
                                 float* values) {
    if (gradient.latents == nullptr) return;
    for (int64_t c = 0; c < gradient.width(); ++c) {
        if (!latent_at(lookup, *gradient.latents, row, c).inside) values[c] = 0.0f;
    }
}

// Where the gradients of the rows of a task go, one after another.
class Destination {
  public:
    Destination(const Lookup& lookup, const StoreGradient& gradient, const GradientSink& sink,
                int64_t first_row)
        : lookup_(lookup), gradient_(gradient), sink_(sink), next_(first_row) {
        if (sink.updated != nullptr) own_.resize(gradient.width());
    }

    // Where the gradient of a row is added up, and whether it starts from nothing.
    EMBCOMPRESS_INLINE float* start(int64_t row) {
        row_ = row;
        if (sink_.dense != nullptr) return sink_.dense + row * gradient_.width();
        float* target = sink_.updated != nullptr ? own_.data()
                                                 : sink_.values + next_ * gradient_.width();
        // Uses may add to some columns only.
        if (!starts_from_nothing()) std::fill(target, target + gradient_.width(), 0.0f);
        if (sink_.rows != nullptr) sink_.rows[next_] = row;
        ++next_;
        return target;
    }
    bool starts_from_nothing() const {
        return sink_.dense == nullptr && gradient_.sources.size() == 1 &&
               gradient_.sources[0].width == gradient_.width();
    }
    EMBCOMPRESS_INLINE void prefetch(int64_t row) const {
        if (sink_.updated != nullptr) sink_.updated->prefetch(row);
    }
    EMBCOMPRESS_INLINE void finish(float* target) {
        mask_row(lookup_, gradient_, row_, target);
        if (sink_.updated != nullptr) sink_.updated->update(row_, target);
    }

  private:
    const Lookup& lookup_;
    const StoreGradient& gradient_;
    const GradientSink& sink_;
    int64_t next_;
    int64_t row_ = 0;
    std::vector<float> own_;
};

// Some entries: what each adds to its row, as factors of a product, and the number before it.
struct Entries {
    int count;
    int64_t rows[kBlock];
    int32_t sources[kBlock];
    int64_t positions[kBlock];
    float coefficients[kBlock];
    std::vector<const float*> factors;  // kBlock of each
};

class Reducer {
  public:
    Reducer(const OutputGradient& output, int64_t most_probes)
        : output_(output), lookup_(output.lookup()), block_(output.lookup()) {
        entries_.factors.resize(kBlock * most_probes);
    }

    // Adds up entries [begin, end), whole rows.
    EMBCOMPRESS_INLINE void reduce_inline(const StoreGradient& gradient, int64_t begin, int64_t end,
                                          Destination& destination) {
        float* target = nullptr;
        int64_t row = -1;
        bool start = false;
        for (int64_t at = begin; at < end; at += entries_.count) {
            load(gradient, at, end, &destination);
            for (int i = 0; i < entries_.count;) {
                const int last = end_of_run(gradient, i);
                if (entries_.rows[i] != row) {
                    if (target != nullptr) destination.finish(target);
                    row = entries_.rows[i];
                    target = destination.start(row);
                    start = destination.starts_from_nothing();
                }
                pool_run(gradient.sources[entries_.sources[i]], i, last, start, target);
                start = false;
                i = last;
            }
        }
        if (target != nullptr) destination.finish(target);
    }

    // Adds up entries [begin, end) of one row.
    EMBCOMPRESS_INLINE void add_inline(const StoreGradient& gradient, int64_t begin, int64_t end,
                                       float* target) {
        for (int64_t at = begin; at < end; at += entries_.count) {
            load(gradient, at, end, nullptr);
            for (int i = 0; i < entries_.count;) {
                const int last = end_of_run(gradient, i);
                pool_run(gradient.sources[entries_.sources[i]], i, last, false, target);
                i = last;
            }
        }
    }

    // Adds ids [begin, end) of the source's feature, in the order of the batch, to the rows that
    // they touch. False for an id outside the vocabulary.
    EMBCOMPRESS_INLINE bool add_batch_inline(const StoreGradient& gradient, const Source& source,
                                             int64_t begin, int64_t end, float* sums,
                                             uint8_t* touched) {
        bool valid = true;
        for (int64_t at = begin; at < end; at += kBlock) {
            const int n = static_cast<int>(std::min<int64_t>(kBlock, end - at));
            int64_t rows[kBlock];
            block_.use(*source.feature);
            valid &= touched_rows(lookup_, source.use, source.first + at, n, block_, rows);
            int count = 0;
            for (int i = 0; i < n; ++i) {
                if (rows[i] < 0) continue;
                entries_.rows[count] = rows[i];
                entries_.positions[count++] = source.first + at + i;
            }
            entries_.count = count;
            for (int i = 0; i < count; ++i) load_entry(source, i);
            if (source.is_product) load_factors(source);
            for (int i = 0; i < count; ++i) {
                touched[entries_.rows[i]] = 1;
                pool_run(source, i, i + 1, false, sums + entries_.rows[i] * gradient.width());
            }
        }
        return valid;
    }

  private:
    // Entries of one row and one use.
    EMBCOMPRESS_INLINE int end_of_run(const StoreGradient& gradient, int begin) const {
        int end = begin + 1;
        const bool alike = gradient.sources.size() == 1;
        while (end < entries_.count && entries_.rows[end] == entries_.rows[begin] &&
               (alike || entries_.sources[end] == entries_.sources[begin])) {
            ++end;
        }
        return end;
    }

    // Loads entries from `begin` on: a block, or fewer where the uses of a product change.
    EMBCOMPRESS_INLINE void load(const StoreGradient& gradient, int64_t begin, int64_t end,
                                 const Destination* destination) {
        const int most = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
        int count = 0;
        for (; count < most; ++count) {
            const int64_t row = gradient.sorted.row(begin + count);
            const int32_t use = static_cast<int32_t>(gradient.sorted.use(begin + count));
            if (gradient.has_products && count > 0 && use != entries_.sources[0]) break;
            const Source& source = gradient.sources[use];
            entries_.rows[count] = row;
            entries_.sources[count] = use;
            entries_.positions[count] = source.first + gradient.sorted.position(begin + count);
            output_.prefetch_sample(entries_.positions[count]);
            const bool is_new = count == 0 || row != entries_.rows[count - 1];
            if (destination != nullptr && is_new) destination->prefetch(row);
        }
        entries_.count = count;
        for (int i = 0; i < count; ++i) load_entry(gradient.sources[entries_.sources[i]], i);
        const Source& source = gradient.sources[entries_.sources[0]];
        if (source.is_product) load_factors(source);
    }

    EMBCOMPRESS_INLINE void load_entry(const Source& source, int i) {
        const int64_t position = entries_.positions[i];
        if (source.use.role != Role::kRows) {
            entries_.factors[i] = source.added.data() + (position - source.first) * source.width;
            entries_.coefficients[i] = 1.0f;
            return;
        }
        const int64_t feature = source.use.feature, sample = output_.sample(feature, position);
        const bool concat = source.feature->combine == Combine::kConcat;
        const float* mine = output_.of_sample(feature, sample) + (concat ? source.probe->column : 0);
        for (int64_t c = 0; c < std::min(source.width, kPrefetchFloats); c += 16) {
            __builtin_prefetch(mine + c);
        }
        entries_.factors[i] = mine;
        if (!source.has_coefficients) return;
        float coefficient = output_.coefficient(feature, position, sample);
        if (source.probe->scale.kind != ScaleKind::kNone) {
            coefficient *= scale_of(lookup_, source.probe->scale, lookup_.id(position));
        }
        entries_.coefficients[i] = coefficient;
    }

    // The rows that the entries' rows are multiplied by, and their scales.
    EMBCOMPRESS_INLINE void load_factors(const Source& source) {
        const int count = entries_.count;
        int64_t ids[kBlock];
        for (int i = 0; i < count; ++i) ids[i] = lookup_.id(entries_.positions[i]);
        block_.use(*source.feature);
        block_.set_ids(ids, count);
        const float** factors = entries_.factors.data();
        for (int u = 0; u < block_.num_probes(); ++u) {
            if (u == source.use.probe) continue;
            factors += kBlock;
            block_.find_rows(u, count);
            block_.find_pointers(u, count);
            std::copy(block_.pointers(u), block_.pointers(u) + count, factors);
            if (!block_.scaled()) continue;
            for (int i = 0; i < count; ++i) entries_.coefficients[i] *= block_.scales(u)[i];
        }
    }

    EMBCOMPRESS_INLINE void pool_run(const Source& source, int begin, int end, bool start,
                                     float* target) const {
        const int factors = source.is_product ? static_cast<int>(source.feature->num_probes) : 1;
        const ProbeRows rows{entries_.factors.data(), nullptr, factors};
        const float* weights = source.has_coefficients ? entries_.coefficients : nullptr;
        pool_probes<true>(rows, {begin, end, weights, start, 0, target + source.column},
                          source.width);
    }

    const OutputGradient& output_;
    const Lookup& lookup_;
    RowBlock block_;
    Entries entries_;
};

EMBCOMPRESS_CLONES void reduce_rows(Reducer& reducer, const StoreGradient& gradient, int64_t begin,
                                    int64_t end, Destination& destination) {
    reducer.reduce_inline(gradient, begin, end, destination);
}

EMBCOMPRESS_CLONES void add_entries(Reducer& reducer, const StoreGradient& gradient, int64_t begin,
                                    int64_t end, float* target) {
    reducer.add_inline(gradient, begin, end, target);
}

EMBCOMPRESS_CLONES bool add_batch(Reducer& reducer, const StoreGradient& gradient,
                                  const Source& source, int64_t begin, int64_t end, float* sums,
                                  uint8_t* touched) {
    return reducer.add_batch_inline(gradient, source, begin, end, sums, touched);
}

EMBCOMPRESS_CLONES void update_range(const Updated& store, const int64_t* rows,
                                     const float* values, int64_t begin, int64_t end) {
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
    std::vector<float> sums;
    std::vector<uint8_t> touched;
};

void add_sums(const Piece& piece) {
    std::vector<float>& sums = piece.gradient->sums;
    const int64_t rows = piece.gradient->store.rows, width = piece.gradient->store.width;
    const bool is_transposed = piece.source->use.role == Role::kHead;
    for (int64_t r = 0; r < rows; ++r) {
        if (!piece.touched[r]) continue;
        piece.gradient->touched[r] = 1;
        for (int64_t c = 0; c < width; ++c) {
            sums[r * width + c] += piece.sums[is_transposed ? c * rows + r : r * width + c];
        }
    }
}

}  // namespace

struct StoreGradients::State {
    const Lookup& lookup;
    const OutputGradient output;
    const int num_threads;
    std::vector<StoreGradient> stores;
    std::atomic<bool> valid{true};

    State(const Lookup& lookup, const float* grad, int num_threads)
        : lookup(lookup), output(lookup, grad, num_threads), num_threads(num_threads) {}

    void add_store(int64_t number);
    Source source_of(const Use& use) const;
    bool add_piece(Piece& piece, RowBlock& block, Reducer& reducer) const;
    void add_pieces();
    void add_contributions_of_ids();
    void sort();
    void reduce_tasks(const std::vector<GradientSink>& sinks);
    void reduce_huge(const StoreGradient& gradient, const SortedRows::Task& task,
                     Destination& destination, Reducer& reducer);
    void deliver_sums(StoreGradient& gradient, const GradientSink& sink) const;
    int64_t most_probes() const;
};

Source StoreGradients::State::source_of(const Use& use) const {
    Source source{};
    source.use = use;
    source.feature = &lookup.features[use.feature];
    source.first = ids_of(lookup, use.feature).begin;
    if (use.role == Role::kHead) return source;
    source.probe = &probe_of(lookup, use);
    if (use.role != Role::kRows) {
        source.width = contribution_width(lookup, use);
        source.column = contribution_column(lookup, use);
        return source;
    }
    source.width = source.probe->width;
    source.is_product =
        source.feature->combine == Combine::kMul && source.feature->num_probes > 1;
    source.has_coefficients = output.has_coefficients(use.feature) ||
                              source.probe->scale.kind != ScaleKind::kNone;
    for (int64_t t = 0; source.is_product && t < source.feature->num_probes; ++t) {
        const Probe& other = lookup.probes[source.feature->first_probe + t];
        source.has_coefficients |= other.scale.kind != ScaleKind::kNone;
    }
    return source;
}

void StoreGradients::State::add_store(int64_t number) {
    StoreGradient& gradient = stores.emplace_back();
    gradient.store = lookup.stores[number];
    gradient.number = number;
    int64_t count = 0;
    const std::vector<Use> uses = uses_of(lookup, number);
    for (const Use& use : uses) count += ids_of(lookup, use.feature).size();
    const int64_t rows = gradient.store.rows, numbers = rows * gradient.store.width;
    const bool is_small = numbers <= kSmallGradient && rows <= count;
    for (const Use& use : uses) {
        const Source source = source_of(use);
        if (use.role == Role::kRows && is_latent(lookup, *source.probe)) {
            gradient.latents = source.probe;
        }
        const bool is_summed = use.role == Role::kHead ||
                               (use.role == Role::kRows ? is_small : rows == 1);
        (is_summed ? gradient.summed : gradient.sources).push_back(source);
        gradient.has_products |= source.is_product;
    }
    if (!gradient.summed.empty()) {
        gradient.sums.assign(numbers, 0.0f);
        gradient.touched.assign(rows, 0);
    }
}

int64_t StoreGradients::State::most_probes() const {
    int64_t most = 1;
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        most = std::max(most, lookup.features[f].num_probes);
    }
    return most;
}

bool StoreGradients::State::add_piece(Piece& piece, RowBlock& block, Reducer& reducer) const {
    piece.sums.assign(piece.gradient->sums.size(), 0.0f);
    piece.touched.assign(piece.gradient->touched.size(), 0);
    const Source& source = *piece.source;
    float* sums = piece.sums.data();
    if (source.use.role == Role::kRows) {
        return add_batch(reducer, *piece.gradient, source, piece.begin, piece.end, sums,
                         piece.touched.data());
    }
    std::fill(piece.touched.begin(), piece.touched.end(), uint8_t{1});
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
            const int64_t count = is_head ? lookup.batch : ids_of(lookup, source.use.feature).size();
            const int64_t length = std::max(kShortestPiece, (count + kMostPieces - 1) / kMostPieces);
            for (int64_t at = 0; at < count; at += length) {
                pieces.push_back({&gradient, &source, at, std::min(at + length, count), {}, {}});
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
    for (const Piece& piece : pieces) add_sums(piece);
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

// Stores that are most of the work are sorted by all threads, the others by one each.
void StoreGradients::State::sort() {
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
    const auto sort_one = [&](size_t k, int threads) {
        if (uses[k].empty()) return;
        StoreGradient& gradient = stores[k];
        if (!gradient.sorted.sort(lookup, uses[k], gradient.store.rows, threads)) valid = false;
        if (!valid || gradient.sums.empty()) return;
        for (const SortedRows::Task& task : gradient.sorted.tasks()) {
            for (int64_t at = task.begin; at < task.end; ++at) {
                gradient.touched[gradient.sorted.row(at)] = 1;
            }
        }
    };
    std::vector<size_t> small;
    for (size_t k = 0; k < stores.size(); ++k) {
        if (2 * work[k] * num_threads > total) {
            sort_one(k, num_threads);
        } else {
            small.push_back(k);
        }
    }
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(num_threads, small.size())), [&](int) {
        for (size_t number = next++; number < small.size(); number = next++) {
            sort_one(small[number], 1);
        }
    });
}

// A row of very many entries: pieces in parallel, then their sum in order.
void StoreGradients::State::reduce_huge(const StoreGradient& gradient,
                                        const SortedRows::Task& task, Destination& destination,
                                        Reducer& reducer) {
    const int64_t pieces = (task.end - task.begin + kPiece - 1) / kPiece, width = gradient.width();
    std::vector<float> partial(pieces * width);
    const int parts = static_cast<int>(std::min<int64_t>(num_threads, pieces));
    const auto add_piece = [&](Reducer& own, int64_t piece) {
        const int64_t begin = task.begin + piece * kPiece;
        add_entries(own, gradient, begin, std::min(begin + kPiece, task.end),
                    partial.data() + piece * width);
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
    float* target = destination.start(gradient.sorted.row(task.begin));
    if (destination.starts_from_nothing()) std::fill(target, target + width, 0.0f);
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t c = 0; c < width; ++c) target[c] += partial[piece * width + c];
    }
    destination.finish(target);
}

void StoreGradients::State::reduce_tasks(const std::vector<GradientSink>& sinks) {
    struct Item {
        size_t k;
        const SortedRows::Task* task;
    };
    std::vector<Item> items, huge;
    for (size_t k = 0; k < stores.size(); ++k) {
        const SortedRows& sorted = stores[k].sorted;
        for (const SortedRows::Task& task : sorted.tasks()) {
            const bool is_huge = task.end - task.begin > kHugeRow &&
                                 sorted.row(task.begin) == sorted.row(task.end - 1);
            (is_huge ? huge : items).push_back({k, &task});
        }
    }
    std::atomic<size_t> next{0};
    parallel(static_cast<int>(std::min<int64_t>(num_threads, items.size())), [&](int) {
        Reducer reducer(output, most_probes());
        for (size_t number = next++; number < items.size(); number = next++) {
            const auto [k, task] = items[number];
            Destination destination(lookup, stores[k], sinks[k], task->first_row);
            reduce_rows(reducer, stores[k], task->begin, task->end, destination);
        }
    });
    if (huge.empty()) return;
    Reducer reducer(output, most_probes());
    for (const auto& [k, task] : huge) {
        Destination destination(lookup, stores[k], sinks[k], task->first_row);
        reduce_huge(stores[k], *task, destination, reducer);
    }
}

void StoreGradients::State::deliver_sums(StoreGradient& gradient, const GradientSink& sink) const {
    const int64_t width = gradient.width();
    int64_t number = 0;
    for (int64_t row = 0; row < gradient.store.rows; ++row) {
        if (!gradient.touched[row]) continue;
        float* values = gradient.sums.data() + row * width;
        mask_row(lookup, gradient, row, values);
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
                               const std::vector<int64_t>& wanted, int num_threads)
    : state_(new State(lookup, grad, num_threads)) {
    state_->stores.reserve(wanted.size());
    for (const int64_t number : wanted) state_->add_store(number);
}

StoreGradients::~StoreGradients() = default;

bool StoreGradients::prepare() {
    if (state_->lookup.num_ids == 0) return true;
    state_->add_pieces();
    if (state_->valid) state_->add_contributions_of_ids();
    if (state_->valid) state_->sort();
    return state_->valid;
}

int64_t StoreGradients::num_touched(size_t k) const {
    if (state_->lookup.num_ids == 0) return 0;
    const StoreGradient& gradient = state_->stores[k];
    if (gradient.sums.empty()) return gradient.sorted.num_touched();
    return std::count(gradient.touched.begin(), gradient.touched.end(), 1);
}

bool StoreGradients::may_update(size_t k) const {
    const Lookup& lookup = state_->lookup;
    const int64_t number = state_->stores[k].number;
    for (const StoreGradient& other : state_->stores) {
        // Tables may hold one tensor as two stores.
        if (other.number != number && other.store.data == state_->stores[k].store.data) return false;
    }
    for (int64_t f = 0; f < lookup.header.num_features; ++f) {
        const Feature& feature = lookup.features[f];
        for (int64_t t = 0; t < feature.num_probes; ++t) {
            const Probe& probe = lookup.probes[feature.first_probe + t];
            const Quantization& q = probe.quantization;
            const bool is_factor = feature.combine == Combine::kMul && feature.num_probes > 1;
            const bool is_scale =
                probe.scale.kind == ScaleKind::kWeight && probe.scale.store == number;
            const bool is_step = q.bits > 0 && (q.scale_store == number || q.bias_store == number);
            if ((is_factor && probe.store == number) || is_scale || is_step) return false;
        }
    }
    return true;
}

void StoreGradients::reduce(const std::vector<GradientSink>& sinks) {
    if (state_->lookup.num_ids == 0) return;
    std::vector<GradientSink> targets = sinks;
    for (size_t k = 0; k < sinks.size(); ++k) {
        StoreGradient& gradient = state_->stores[k];
        if (!gradient.sums.empty()) targets[k] = GradientSink{gradient.sums.data()};
    }
    state_->reduce_tasks(targets);
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
