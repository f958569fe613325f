// relu2, the choice of 2 in 4 features and the count of non-zeros, for two tokens at a time.
#pragma once
#include <cstdint>

#include "activation.cuh"
#include "prune24.cuh"

namespace s24jax {

// 16 features of two tokens: of each 8 kept values (16 bytes); returns the nibbles, those of the
// first token in the low half. Adds to the features' counts of non-zeros, a half for each token.
__device__ __forceinline__ uint32_t sparsify_16(const uint4 (&first)[2], const uint4 (&second)[2],
                                                uint4& first_values, uint4& second_values,
                                                uint32_t (&counts)[16]) {
  uint32_t values[2][4], nibbles = 0;
#pragma unroll
  for (int group = 0; group < 4; group++) {
    uint32_t member[4], kept[4];
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      const int word = group % 2 * 2 + pair;
      const uint32_t a = relu_pair(word_of(first[group / 2], word));
      const uint32_t b = relu_pair(word_of(second[group / 2], word));
      member[2 * pair] = permute(a, b, 0x5410);
      member[2 * pair + 1] = permute(a, b, 0x7632);
    }
    // From 0x2000 = 2^-63 on, a square is not zero: adding 0x6000 carries into the sign bit.
#pragma unroll
    for (int i = 0; i < 4; i++) {
      counts[4 * group + i] += ((member[i] + 0x60006000u) & kSigns) >> 15;
    }
    choose_two(member, kept);  // no signs are left, and one NaN
    const uint32_t x = first_kept(member, kept), y = second_kept(member, kept);
    values[0][group] = square_pair(low_of(x), low_of(y));
    values[1][group] = square_pair(high_of(x), high_of(y));
    nibbles = select(0x000F000Fu << (4 * group), nibbles_of(kept), nibbles);
  }
  first_values = make_uint4(values[0][0], values[0][1], values[0][2], values[0][3]);
  second_values = make_uint4(values[1][0], values[1][1], values[1][2], values[1][3]);
  return nibbles;
}

// Adds up the counts of both tokens and of the 8 threads of a warp that share lane % 4; returns
// those of features 2 * (lane / 4), in the low half, and the next.
__device__ __forceinline__ uint32_t sum_over_tokens(const uint32_t (&counts)[16]) {
  const int lane = threadIdx.x % 32;
  uint32_t eight[8], four[4], two[2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    eight[i] = permute(counts[2 * i], counts[2 * i + 1], 0x5410) +
               permute(counts[2 * i], counts[2 * i + 1], 0x7632);
  }
  // Each step gives away the half that the other lane keeps.
  const auto step = [&](uint32_t first, uint32_t second, int bit) {
    const bool keeps_second = lane & bit;
    const uint32_t given = keeps_second ? first : second, kept = keeps_second ? second : first;
    return kept + __shfl_xor_sync(0xFFFFFFFF, given, bit);
  };
#pragma unroll
  for (int i = 0; i < 4; i++) four[i] = step(eight[i], eight[4 + i], 16);
#pragma unroll
  for (int i = 0; i < 2; i++) two[i] = step(four[i], four[2 + i], 8);
  return step(two[0], two[1], 4);
}

}  // namespace s24jax
