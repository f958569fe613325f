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

// A tensor of AXES axes, the innermost (contiguous) first, of bf16 (2 bytes) or 32-bit words (4).
// `strides` are those of the outer axes, in elements. Reads beyond an axis give zeros. False where
// the driver refuses it: a stride that is no multiple of 16 bytes.
template <int AXES = 3>
bool map_tensor(CUtensorMap* map, const void* data, int element_bytes,
                std::array<int64_t, AXES> shape, std::array<int64_t, AXES - 1> strides,
                std::array<int, AXES> box, CUtensorMapSwizzle swizzle) {
  const auto type =
      element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  cuuint64_t shape_[AXES], strides_[AXES - 1];
  cuuint32_t box_[AXES], steps[AXES];
  for (int i = 0; i < AXES; i++) {
    shape_[i] = shape[i];
    box_[i] = box[i];
    steps[i] = 1;
    if (i > 0) strides_[i - 1] = element_bytes * strides[i - 1];
  }
  return encode_tiled() &&
         encode_tiled()(map, type, AXES, const_cast<void*>(data), shape_, strides_, box_, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace s24jax
