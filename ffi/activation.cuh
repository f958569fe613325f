// Squared ReLU and its gradient, on two bf16 a word: s24jax/activation.py.
#pragma once
#include <cstdint>

#include "hopper.cuh"

namespace s24jax {

__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000);
}

// relu of two bf16; NaN becomes the canonical NaN (0x7fff), which ranks above all other bits.
__device__ __forceinline__ uint32_t relu_pair(uint32_t pair) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0));
  return result;
}

// x^2 and y^2, rounded once; squares below the smallest normal number are zero.
__device__ __forceinline__ uint32_t square_pair(float x, float y) {
  asm("mul.ftz.f32 %0, %0, %0;" : "+f"(x));
  asm("mul.ftz.f32 %0, %0, %0;" : "+f"(y));
  return round_pair(x, y);
}

__device__ __forceinline__ uint32_t relu2_pair(uint32_t y1) {
  const uint32_t relu = relu_pair(y1);
  return square_pair(low_of(relu), high_of(relu));
}

// sqrt to the last bit but one of float32, far below the rounding that follows.
__device__ __forceinline__ float square_root(float x) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 2 * sqrt(Y2) * dY2, rounded once.
__device__ __forceinline__ uint32_t relu2_gradient_pair(uint32_t y2, uint32_t dy2) {
  return round_pair(2 * square_root(low_of(y2)) * low_of(dy2),
                    2 * square_root(high_of(y2)) * high_of(dy2));
}

}  // namespace s24jax
