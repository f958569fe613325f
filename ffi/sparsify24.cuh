// relu2 and the choice of 2 in 4 features, on bits of bf16.
#pragma once
#include <cstdint>

#include "activation.cuh"

namespace s24jax {

struct Kept {
  uint32_t first, second;  // bits of the kept elements, in the order of their positions
  uint32_t nibble;         // their positions, i0 | i1 << 2
};

// The two largest of four ranks of at most 16 bits; the earlier of two equal ones wins. A rank's
// key carries 3 minus its position in the low bits, so that no two keys are equal.
__device__ __forceinline__ Kept choose_two(uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t k0 = r0 << 2 | 3, k1 = r1 << 2 | 2, k2 = r2 << 2 | 1, k3 = r3 << 2;
  const uint32_t high01 = max(k0, k1), low01 = min(k0, k1);
  const uint32_t high23 = max(k2, k3), low23 = min(k2, k3);
  const uint32_t largest = max(high01, high23);
  const uint32_t next = max(min(high01, high23), max(low01, low23));
  const bool in_order = (largest & 3) > (next & 3);
  const uint32_t a = in_order ? largest : next, b = in_order ? next : largest;
  return {a >> 2, b >> 2, (~a & 3) | (~b & 3) << 2};
}

// 16 features of one token: 8 kept values (16 bytes) and 4 nibbles; adds to the counts of
// non-zeros, two features a word.
__device__ __forceinline__ uint32_t sparsify_16(const uint4 (&in)[2], uint4& out,
                                                uint32_t (&counts)[8]) {
  const uint32_t pairs[8] = {in[0].x, in[0].y, in[0].z, in[0].w,
                             in[1].x, in[1].y, in[1].z, in[1].w};
  uint32_t kept[4], nibbles = 0;
#pragma unroll
  for (int group = 0; group < 4; group++) {
    const uint32_t low = relu_pair(pairs[2 * group]), high = relu_pair(pairs[2 * group + 1]);
    // From 0x2000 = 2^-63 on, a square is not zero: adding 0x6000 carries into the sign bit.
    counts[2 * group] += (low + 0x60006000u) >> 15 & 0x00010001u;
    counts[2 * group + 1] += (high + 0x60006000u) >> 15 & 0x00010001u;
    const Kept two = choose_two(low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16);
    kept[group] = square_pair(two.first | two.second << 16);
    nibbles |= two.nibble << (4 * group);
  }
  out = make_uint4(kept[0], kept[1], kept[2], kept[3]);
  return nibbles;
}

// Adds up the counts of the 8 threads of a warp that share lane % 4; returns word lane / 4 of them.
__device__ __forceinline__ uint32_t sum_over_tokens(const uint32_t (&counts)[8]) {
  const int lane = threadIdx.x % 32;
  uint32_t four[4], two[2];
  // Each step gives away the half that the other lane keeps.
  const auto step = [&](uint32_t first, uint32_t second, int bit) {
    const bool keeps_second = lane & bit;
    const uint32_t given = keeps_second ? first : second, kept = keeps_second ? second : first;
    return kept + __shfl_xor_sync(0xFFFFFFFF, given, bit);
  };
#pragma unroll
  for (int i = 0; i < 4; i++) four[i] = step(counts[i], counts[4 + i], 16);
#pragma unroll
  for (int i = 0; i < 2; i++) two[i] = step(four[i], four[2 + i], 8);
  return step(two[0], two[1], 4);
}

}  // namespace s24jax
