// The flat encoding of lookup plans, and addresses: one source for C++ and CUDA.
//
// Python (embcompress/engine/encoding.py) builds the encoding once for a module: a header, a
// record for every feature, a record for every probe, all int64. The structs below are those
// records, field by field, so that nothing is parsed.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EMBCOMPRESS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define EMBCOMPRESS_INLINE inline __attribute__((always_inline))
#else
#define EMBCOMPRESS_INLINE inline
#endif

namespace embcompress {

constexpr int64_t kFormat = 9;

enum class Pool : int64_t { kNone = 0, kSum = 1, kMean = 2 };
// Rows are added up or multiplied, all of the feature's width; or each is added to its columns.
enum class Combine : int64_t { kSum = 0, kMul = 1, kPlace = 2 };
enum class AddressKind : int64_t { kDigit = 0, kHash = 1, kMurmur = 2 };
enum class SparsityForm : int64_t { kNone = 0, kMask = 1, kPositions = 2 };
enum class ScaleKind : int64_t { kNone = 0, kSign = 1, kWeight = 2 };

struct Header {
    int64_t format;
    int64_t num_features;
    int64_t num_probes;
    int64_t num_columns;  // of the output
};

struct Feature {
    int64_t num_embeddings;
    int64_t padding_idx;  // -1: none
    Pool pool;
    Combine combine;
    int64_t width;       // of the combined vector
    int64_t out_column;  // where it begins in the output
    int64_t first_probe;
    int64_t num_probes;
    int64_t head_store;  // -1: none; else out_width rows of width numbers
    int64_t out_width;   // of the output; width where there is no head
};

// A digit, (id / a) % b; a keyed hash into b buckets with key a; or a word of MurmurHash3_x64_128
// modulo b, where a is the word's number and, in its low half, the seed.
struct Address {
    AddressKind kind;
    int64_t a;
    int64_t b;
};

// Codes of `bits` bits that give the row, code - first; all bits set is "absent". Or slots: the row
// is first + the number of the slot that holds the id's tag, in the bucket that is the code's row.
struct CodeTable {
    int64_t store;  // -1: the address itself is the row
    int64_t bits;
    int64_t width;
    int64_t column;
    int64_t first;
    int64_t size;
    int64_t is_slot;
    Address tag;  // of a slot
};

// Where absent ids go: to the row of another address, or to that of its code in another table.
struct Code {
    CodeTable table;
    int64_t has_otherwise;
    Address otherwise;
    CodeTable other;
};

struct Scale {
    ScaleKind kind;
    int64_t key;    // of a sign
    int64_t store;  // of a weight
    int64_t column;
    Address address;  // of the weight, or of the row in the table of codes
    Code code;
};

// Packed values: scale * code + bias, or scale * (code - (2^bits - 1) / 2) without a bias.
struct Quantization {
    int64_t bits;  // 0: the store is float
    int64_t scale_store;
    int64_t bias_store;  // -1: symmetric
    int64_t per_row;
    int64_t per_column;
};

// Which numbers of a store are kept: by a bit for each, or by their rising positions in a block of
// rows, which begins at a known one of them.
struct Sparsity {
    SparsityForm form;
    int64_t stored;
    int64_t rows;   // of the store
    int64_t block;  // rows of a block
    int64_t index_store;
    int64_t index_bits;
    int64_t starts_store;
    int64_t starts_bits;
};

struct Probe {
    int64_t store;
    int64_t offset;  // added to the address
    int64_t column;  // where its columns begin in the combined vector; 0 in sums and products
    int64_t width;
    int64_t stride;   // row i begins at number i * stride of the store; width, or less of it
    Address address;  // of the row, or of the row in the table of codes
    Code code;
    Scale scale;
    Quantization quantization;
    Sparsity sparsity;
};

constexpr int64_t kHeaderFields = sizeof(Header) / sizeof(int64_t);
constexpr int64_t kFeatureFields = sizeof(Feature) / sizeof(int64_t);
constexpr int64_t kProbeFields = sizeof(Probe) / sizeof(int64_t);
static_assert(kHeaderFields == 4 && kFeatureFields == 10 && kProbeFields == 76,
              "change embcompress/engine/encoding.py too");

// ------------------------------------------------------------------------------------ hashing

constexpr uint64_t kFirstMixer = 0xBF58476D1CE4E5B9ULL;
constexpr uint64_t kSecondMixer = 0x94D049BB133111EBULL;

EMBCOMPRESS_INLINE uint64_t mix64(uint64_t x) {
    x ^= x >> 30;
    x *= kFirstMixer;
    x ^= x >> 27;
    x *= kSecondMixer;
    return x ^ (x >> 31);
}

EMBCOMPRESS_INLINE uint64_t multiply_high(uint64_t x, uint64_t y) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(x, y);
#elif defined(__SIZEOF_INT128__)
    __extension__ typedef unsigned __int128 uint128;
    return static_cast<uint64_t>((static_cast<uint128>(x) * y) >> 64);
#else
    const uint64_t a = x >> 32, b = x & 0xFFFFFFFFULL, c = y >> 32, d = y & 0xFFFFFFFFULL;
    const uint64_t ad = a * d, bc = b * c;
    const uint64_t carry = (ad & 0xFFFFFFFFULL) + (bc & 0xFFFFFFFFULL) + ((b * d) >> 32);
    return a * c + (ad >> 32) + (bc >> 32) + (carry >> 32);
#endif
}

EMBCOMPRESS_INLINE int64_t hash_bucket(int64_t id, uint64_t key, uint64_t buckets) {
    return static_cast<int64_t>(multiply_high(mix64(static_cast<uint64_t>(id) ^ key), buckets));
}

EMBCOMPRESS_INLINE float hash_sign(int64_t id, uint64_t key) {
    return (mix64(static_cast<uint64_t>(id) ^ key) >> 63) ? -1.0f : 1.0f;
}

EMBCOMPRESS_INLINE uint64_t finalize_murmur(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDULL;
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53ULL;
    return x ^ (x >> 33);
}

// Word number `word` of MurmurHash3_x64_128 of the 8 bytes of the id.
EMBCOMPRESS_INLINE uint64_t murmur_word(int64_t id, uint64_t seed, int64_t word) {
    uint64_t mixed = static_cast<uint64_t>(id) * 0x87C37B91114253D5ULL;
    mixed = (mixed << 31) | (mixed >> 33);
    mixed *= 0x4CF5AD432745937FULL;
    uint64_t first = (seed ^ mixed ^ 8) + (seed ^ 8);
    uint64_t second = first + (seed ^ 8);
    first = finalize_murmur(first);
    second = finalize_murmur(second);
    first += second;
    second += first;
    const uint64_t half = word < 2 ? first : second;
    return word % 2 == 0 ? half & 0xFFFFFFFFULL : half >> 32;
}

EMBCOMPRESS_INLINE int64_t address_row(const Address& address, int64_t id) {
    if (address.kind == AddressKind::kMurmur) {
        const uint64_t seed = static_cast<uint64_t>(address.a) & 0xFFFFFFFFULL;
        return static_cast<int64_t>(murmur_word(id, seed, address.a >> 32) %
                                    static_cast<uint64_t>(address.b));
    }
    if (address.kind == AddressKind::kHash) {
        return hash_bucket(id, static_cast<uint64_t>(address.a), static_cast<uint64_t>(address.b));
    }
    return (id / address.a) % address.b;
}

// Number `position` of a stream of `bits`-bit numbers, low bits first, in `bytes` bytes.
EMBCOMPRESS_INLINE uint32_t unpack_bits(const uint8_t* stream, int64_t bytes, int64_t position,
                                        int64_t bits) {
    const int64_t first_bit = position * bits;
    const int64_t first_byte = first_bit >> 3;
    uint64_t window = 0;
    for (int64_t byte = 0; byte < 5; ++byte) {
        const bool inside = 8 * byte < bits + (first_bit & 7) && first_byte + byte < bytes;
#if defined(__CUDA_ARCH__)
        if (!inside) continue;  // loads without branches, none of which waits for another
#else
        if (!inside) break;
#endif
        window |= static_cast<uint64_t>(stream[first_byte + byte]) << (8 * byte);
    }
    return static_cast<uint32_t>((window >> (first_bit & 7)) & ((1ULL << bits) - 1));
}

// Where a code leads: to a row, or nowhere, or to where the ids go that have none.
constexpr int64_t kNowhere = -1;
constexpr int64_t kOtherwise = -2;

// The code in a row of a table of codes.
EMBCOMPRESS_INLINE uint32_t read_code(const CodeTable& code, const void* stream, int64_t bytes,
                                      int64_t row) {
    return unpack_bits(static_cast<const uint8_t*>(stream), bytes, row * code.width + code.column,
                       code.bits);
}

// The row that a code stands for. Codes may be damaged: one past its bound is absent, and never a
// row out of bounds.
EMBCOMPRESS_INLINE int64_t code_row(const CodeTable& code, uint32_t value) {
    const uint32_t absent = static_cast<uint32_t>((1ULL << code.bits) - 1);
    if (value == absent) return kOtherwise;
    const int64_t found = static_cast<int64_t>(value) - code.first;
    return found >= 0 && found < code.size ? found : kNowhere;
}

// The row of the first slot of a bucket that holds the id's tag.
EMBCOMPRESS_INLINE int64_t slot_row(const CodeTable& code, const uint8_t* stream, int64_t bytes,
                                    int64_t bucket, int64_t id) {
    // Mostly the tag is the id itself, which takes no division.
    const bool is_id = code.tag.kind == AddressKind::kDigit && code.tag.a == 1 && id < code.tag.b;
    const uint32_t tag = static_cast<uint32_t>(is_id ? id : address_row(code.tag, id));
    for (int64_t slot = bucket * code.width; slot < (bucket + 1) * code.width; ++slot) {
        if (unpack_bits(stream, bytes, slot, code.bits) != tag) continue;
        return slot < code.size - code.first ? code.first + slot : kNowhere;
    }
    return kOtherwise;
}

EMBCOMPRESS_INLINE int64_t find_row(const CodeTable& code, const void* stream, int64_t bytes,
                                    int64_t row, int64_t id) {
    return code.is_slot ? slot_row(code, static_cast<const uint8_t*>(stream), bytes, row, id)
                        : code_row(code, read_code(code, stream, bytes, row));
}

}  // namespace embcompress
