// How a handler reports what became of it.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace s24jax {

inline xla::ffi::Error failed(const char* op, const char* reason) {
  return xla::ffi::Error(xla::ffi::ErrorCode::kInternal, std::string(op) + ": " + reason);
}

// Success where the runtime reports none.
inline xla::ffi::Error status(const char* op, cudaError_t error) {
  return error == cudaSuccess ? xla::ffi::Error::Success() : failed(op, cudaGetErrorString(error));
}

}  // namespace s24jax
