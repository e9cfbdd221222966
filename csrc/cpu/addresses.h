// Rows of a block of ids by arithmetic, and pointers to rows: a vector of ids at a time.

#pragma once

#include <cstdint>

#include "../plan.h"

namespace embcompress {

// Ids that are looked up together. Arrays of a block have room for so many; what is behind the ids
// that are there is computed, too, and means nothing.
constexpr int kBlock = 128;

// Rows of n ids, as address_row gives them; anything for ids below 0.
void find_addresses(const Address& address, int64_t num_embeddings, const int64_t* ids, int n,
                    int64_t* rows);

// So many floats, with a row every `stride` of them.
struct FloatRows {
    const float* first;
    int64_t count;
    int64_t stride;
};

// Pointers to n rows; to `absent` for rows below 0.
void find_pointers_to(const FloatRows& store, const float* absent, const int64_t* rows, int n,
                      const float** pointers);

}  // namespace embcompress
