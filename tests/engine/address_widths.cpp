// Addresses of blocks of ids by vectors of 2, 4 and 8 numbers. All must be those of single ids.

#include <cstdio>
#include <random>

#include "../../csrc/cpu/addresses.cpp"

namespace {

using namespace embcompress;

std::mt19937_64 random_bits(1);

int64_t draw(int64_t below) { return static_cast<int64_t>(random_bits() % below); }

// Numbers of any size are as likely as others.
int64_t draw_size(int64_t most) { return 1 + draw(std::min(most, int64_t{1} << (1 + draw(40)))); }

Address draw_address(int64_t num_embeddings) {
    if (draw(2) == 0) {
        return {AddressKind::kHash, static_cast<int64_t>(random_bits()), draw_size(1LL << 34)};
    }
    const int64_t divisor = draw(2) == 0 ? 1 : draw_size(num_embeddings);
    return {AddressKind::kDigit, divisor, draw_size(num_embeddings)};
}

struct Block {
    int64_t ids[kBlock];
    int64_t rows[kBlock];
    const float* pointers[kBlock];
    int n = 1 + static_cast<int>(draw(kBlock));
};

template <int kLanes>
int different_addresses(Block& block) {
    const int64_t num_embeddings = draw_size(1LL << 40);
    for (int64_t& id : block.ids) id = draw(num_embeddings);
    block.ids[block.n - 1] = num_embeddings - 1;
    const Address address = draw_address(num_embeddings);
    find_addresses_inline<kLanes>(address, num_embeddings, block.ids, block.n, block.rows);
    int count = 0;
    for (int i = 0; i < block.n; ++i) {
        count += block.rows[i] != address_row(address, block.ids[i]);
    }
    return count;
}

template <int kLanes>
int different_pointers(Block& block) {
    static const float first = 0.0f, absent = 0.0f;
    const int64_t stride = draw_size(1LL << 20), count = draw_size(1LL << 36) * stride;
    for (int64_t& row : block.rows) row = draw(4) == 0 ? -1 : draw(count / stride);
    find_pointers_inline<kLanes>({&first, count, stride}, &absent, block.rows, block.n,
                                 block.pointers);
    int different = 0;
    for (int i = 0; i < block.n; ++i) {
        const auto offset = static_cast<uintptr_t>(block.rows[i] * stride) * sizeof(float);
        const auto found = reinterpret_cast<uintptr_t>(&first) + offset;
        const auto wanted = block.rows[i] < 0 ? reinterpret_cast<uintptr_t>(&absent) : found;
        different += reinterpret_cast<uintptr_t>(block.pointers[i]) != wanted;
    }
    return different;
}

template <int kLanes>
int different() {
    int count = 0;
    for (int k = 0; k < 20000; ++k) {
        Block block;
        count += different_addresses<kLanes>(block) + different_pointers<kLanes>(block);
    }
    return count;
}

}  // namespace

int main() {
    const int count = different<4>() + different<8>() + different<16>();
    std::printf("%d comparisons differ\n", count);
    return count == 0 ? 0 : 1;
}
