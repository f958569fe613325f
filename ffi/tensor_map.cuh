// Tensor maps for the copy engine, made on the host.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

namespace s24jax {

// The driver's function, found through the runtime, so that nothing links against the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

// A tensor of three axes, the innermost (contiguous) first, of bf16 (2 bytes) or 32-bit words (4).
// `strides` are those of the two outer axes, in elements. Reads beyond an axis give zeros. False
// where the driver refuses it: a stride that is no multiple of 16 bytes.
inline bool map_tensor(CUtensorMap* map, const void* data, int element_bytes,
                       std::array<int64_t, 3> shape, std::array<int64_t, 2> strides,
                       std::array<int, 3> box, CUtensorMapSwizzle swizzle) {
  const auto type =
      element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const cuuint64_t shape_[3] = {cuuint64_t(shape[0]), cuuint64_t(shape[1]), cuuint64_t(shape[2])};
  const cuuint64_t strides_[2] = {cuuint64_t(element_bytes * strides[0]),
                                  cuuint64_t(element_bytes * strides[1])};
  const cuuint32_t box_[3] = {cuuint32_t(box[0]), cuuint32_t(box[1]), cuuint32_t(box[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode_tiled() &&
         encode_tiled()(map, type, 3, const_cast<void*>(data), shape_, strides_, box_, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace s24jax
