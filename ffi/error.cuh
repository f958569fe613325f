// How a handler reports a failure.
#pragma once
#include <string>

#include "xla/ffi/api/ffi.h"

namespace s24jax {

inline xla::ffi::Error failed(const char* op, const char* reason) {
  return xla::ffi::Error(xla::ffi::ErrorCode::kInternal, std::string(op) + ": " + reason);
}

}  // namespace s24jax
