// Rows of a block of ids by arithmetic, and pointers to rows.

#include "addresses.h"

#include <algorithm>

#include "vectors.h"

namespace embcompress {
namespace {

constexpr int64_t kNarrow = 1LL << 32;  // numbers below it have 32 bits

// As many 64-bit numbers as a register holds.
template <int kLanes>
struct Longs {
    typedef uint64_t Type __attribute__((vector_size(kLanes * sizeof(float))));
};

// Products of the low 32 bits of numbers: one instruction, which compilers do not find, because
// they do not know that the high bits are no part of it.
template <typename V>
EMBCOMPRESS_INLINE V multiply_halves(V x, V y) {
#if defined(EMBCOMPRESS_X86)
    V product;
    if constexpr (sizeof(V) == 64) {
        asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(x), "v"(y));
    } else if constexpr (sizeof(V) == 32) {
        asm("vpmuludq %2, %1, %0" : "=x"(product) : "x"(x), "x"(y));
    } else {
        product = x;
        asm("pmuludq %1, %0" : "+x"(product) : "x"(y));
    }
    return product;
#else
    constexpr uint64_t kLow = kNarrow - 1;
    return (x & kLow) * (y & kLow);
#endif
}

// Products modulo 2^64. AVX-512 has an instruction for them.
template <typename V>
EMBCOMPRESS_INLINE V multiply(V x, uint64_t factor) {
    if constexpr (sizeof(V) == 64) return x * factor;
    const V y = V{} + factor;
    return multiply_halves(x, y) +
           ((multiply_halves(x >> 32, y) + multiply_halves(x, y >> 32)) << 32);
}

// The high 64 bits of the products of 64-bit numbers and 32-bit ones.
template <typename V>
EMBCOMPRESS_INLINE V multiply_high(V wide, V narrow) {
    return (multiply_halves(wide >> 32, narrow) + (multiply_halves(wide, narrow) >> 32)) >> 32;
}

// See mix64.
template <typename V>
EMBCOMPRESS_INLINE V mix(V x) {
    x = multiply<V>(x ^ (x >> 30), kFirstMixer);
    x = multiply<V>(x ^ (x >> 27), kSecondMixer);
    return x ^ (x >> 31);
}

// Writes f(vector of numbers) for n numbers.
template <typename V, typename From, typename To, typename F>
EMBCOMPRESS_INLINE void map_vectors(const From* from, int n, To* to, const F& f) {
    static_assert(sizeof(From) == 8 && sizeof(To) == 8, "of 64 bits");
    constexpr int kCount = sizeof(V) / 8;
    for (int i = 0; i < n; i += kCount) {
        V numbers;
        std::memcpy(&numbers, from + i, sizeof(V));
        numbers = f(numbers);
        std::memcpy(to + i, &numbers, sizeof(V));
    }
}

template <typename V>
EMBCOMPRESS_INLINE void find_hashes(const Address& address, const int64_t* ids, int n,
                                    int64_t* rows) {
    const V key = V{} + static_cast<uint64_t>(address.a);
    const V buckets = V{} + static_cast<uint64_t>(address.b);
    map_vectors<V>(ids, n, rows, [&](V id) EMBCOMPRESS_INLINED {
        return multiply_high<V>(mix<V>(id ^ key), buckets);
    });
}

// Division by a reciprocal, exact for 32-bit numbers: floor(id * ceil(2^64 / d) / 2^64).
// (Lemire, Kaser, Kurz: "Faster remainder by direct computation", 2019, theorem 1.)
template <typename V>
EMBCOMPRESS_INLINE V reciprocal_of(int64_t divisor) {
    return V{} + (~0ULL / static_cast<uint64_t>(divisor) + 1);
}

template <typename V>
EMBCOMPRESS_INLINE void find_digits(const Address& address, int64_t largest, const int64_t* ids,
                                    int n, int64_t* rows) {
    const int64_t* quotients = ids;
    if (address.a > 1) {
        const V reciprocal = reciprocal_of<V>(address.a);
        map_vectors<V>(ids, n, rows,
                       [&](V id) EMBCOMPRESS_INLINED { return multiply_high<V>(reciprocal, id); });
        quotients = rows;
    }
    if (address.b > largest / address.a) {  // the last digit needs no remainder
        if (quotients == ids) std::memcpy(rows, ids, n * sizeof(int64_t));
        return;
    }
    if (address.b == 1) {
        std::fill(rows, rows + n, 0);
        return;
    }
    const V reciprocal = reciprocal_of<V>(address.b), divisor = V{} + address.b;
    map_vectors<V>(quotients, n, rows, [&](V row) EMBCOMPRESS_INLINED {
        return row - multiply_halves<V>(multiply_high<V>(reciprocal, row), divisor);
    });
}

template <int kLanes>
EMBCOMPRESS_INLINE void find_addresses_inline(const Address& address, int64_t num_embeddings,
                                              const int64_t* ids, int n, int64_t* rows) {
    typedef typename Longs<kLanes>::Type V;
    if (address.kind == AddressKind::kHash && address.b < kNarrow) {
        find_hashes<V>(address, ids, n, rows);
    } else if (address.kind == AddressKind::kDigit && num_embeddings <= kNarrow &&
               address.a < kNarrow) {
        find_digits<V>(address, num_embeddings - 1, ids, n, rows);
    } else {
        for (int i = 0; i < n; ++i) rows[i] = ids[i] < 0 ? 0 : address_row(address, ids[i]);
    }
}

template <int kLanes>
EMBCOMPRESS_INLINE void find_pointers_inline(const FloatRows& store, const float* absent,
                                             const int64_t* rows, int n, const float** pointers) {
    typedef typename Longs<kLanes>::Type V;
    const int64_t stride = store.stride * sizeof(float);
    if (store.count > kNarrow || stride >= kNarrow) {
        for (int i = 0; i < n; ++i) {
            pointers[i] = rows[i] < 0 ? absent : store.first + rows[i] * store.stride;
        }
        return;
    }
    const V first = V{} + reinterpret_cast<uintptr_t>(store.first);
    const V other = V{} + reinterpret_cast<uintptr_t>(absent);
    const V bytes = V{} + static_cast<uint64_t>(stride);
    map_vectors<V>(rows, n, pointers, [&](V row) EMBCOMPRESS_INLINED {
        const V found = first + multiply_halves<V>(row, bytes);
        return (row >> 63) != 0 ? other : found;
    });
}

}  // namespace

void find_addresses(const Address& address, int64_t num_embeddings, const int64_t* ids, int n,
                    int64_t* rows) {
    EMBCOMPRESS_WITH_LANES(find_addresses_inline<lanes>(address, num_embeddings, ids, n, rows));
}

void find_pointers_to(const FloatRows& store, const float* absent, const int64_t* rows, int n,
                      const float** pointers) {
    EMBCOMPRESS_WITH_LANES(find_pointers_inline<lanes>(store, absent, rows, n, pointers));
}

}  // namespace embcompress
