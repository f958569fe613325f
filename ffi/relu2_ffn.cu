// relu2_ffn, the dense FFN: Y2 = relu(X * W_up^T)^2 in its forward pass, dY1 = 2 * sqrt(Y2) * dY2
// with dY2 = dY3 * W_down^T in its backward pass. Y1 and dY2 are never in memory.
#include "activation.cuh"
#include "dense_matmul.cuh"
#include "xla/ffi/api/ffi.h"

namespace s24jax {
namespace {

namespace ffi = xla::ffi;
using dense_matmul::Tile;

// A warp takes 4 rows by 64 columns at a time, 128 bytes of each row, and asks for so many of them
// before it needs the first.
constexpr int kTogether = 8;
constexpr int kBlocks = dense_matmul::kRows / 4;  // of 64 columns

// Element by element: f(sums, y2) of 8 columns each, y2 only where LOADS says that it is read.
template <bool LOADS, typename Function>
struct Elementwise {
  const uint4* y2;  // [T, F]
  uint4* out;       // [T, F]
  int tokens, features;

  static constexpr int kScratchBytes = 0;

  class Run {
   public:
    __device__ Run(const Elementwise& arg, uint32_t tile, uint32_t, int warp)
        : arg_(arg), tile_(tile), warp_(warp) {}
    __device__ void finish(Tile tile) {
      const int lane = threadIdx.x % 32;
      for (int first = warp_ * kTogether; first < kBlocks * tile.columns / 64;
           first += dense_matmul::kEpilogueWarps * kTogether) {
        const int column = first / kBlocks * 64 + lane % 8 * 8;
        const int feature = tile.first_column + column;  // F is a multiple of 8
        int64_t places[kTogether];
        uint4 y2[kTogether] = {};
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          const int token = tile.first_row() + row_of(first + i);
          const bool inside = token < arg_.tokens && feature < arg_.features;
          places[i] = inside ? (int64_t(token) * arg_.features + feature) / 8 : -1;
          if (LOADS && inside) y2[i] = __ldg(arg_.y2 + places[i]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
          const uint32_t unit = dense_matmul::unit_of(tile_, row_of(first + i), column);
          if (places[i] >= 0) __stcs(arg_.out + places[i], Function::of(load_shared_16(unit), y2[i]));
        }
      }
    }

   private:
    __device__ static int row_of(int block) {
      return block % kBlocks * 4 + threadIdx.x % 32 / 8;
    }

    const Elementwise& arg_;
    const uint32_t tile_;
    const int warp_;
  };
};

struct Relu2 {
  __device__ static uint4 of(const uint4& y1, const uint4&) {
    return make_uint4(relu2_pair(y1.x), relu2_pair(y1.y), relu2_pair(y1.z), relu2_pair(y1.w));
  }
};

struct Relu2Gradient {
  __device__ static uint4 of(const uint4& dy2, const uint4& y2) {
    return make_uint4(relu2_gradient_pair(y2.x, dy2.x), relu2_gradient_pair(y2.y, dy2.y),
                      relu2_gradient_pair(y2.z, dy2.z), relu2_gradient_pair(y2.w, dy2.w));
  }
};

ffi::Error relu2_ffn_y2(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                        ffi::ResultBuffer<ffi::BF16> y2, int32_t group) {
  Elementwise<false, Relu2> epilogue = {};
  epilogue.out = reinterpret_cast<uint4*>(y2->typed_data());
  epilogue.tokens = static_cast<int>(y2->dimensions()[0]);
  epilogue.features = static_cast<int>(y2->dimensions()[1]);
  return dense_matmul::launch("relu2_ffn", stream, x, w,
                              dense_matmul::natural_rows(epilogue.tokens), group, epilogue);
}

ffi::Error relu2_ffn_dy1(cudaStream_t stream, ffi::Buffer<ffi::BF16> dy3,
                         ffi::Buffer<ffi::BF16> w, ffi::Buffer<ffi::BF16> y2,
                         ffi::ResultBuffer<ffi::BF16> dy1, int32_t group) {
  Elementwise<true, Relu2Gradient> epilogue = {};
  epilogue.y2 = reinterpret_cast<const uint4*>(y2.typed_data());
  epilogue.out = reinterpret_cast<uint4*>(dy1->typed_data());
  epilogue.tokens = static_cast<int>(dy1->dimensions()[0]);
  epilogue.features = static_cast<int>(dy1->dimensions()[1]);
  return dense_matmul::launch("relu2_ffn", stream, dy3, w,
                              dense_matmul::natural_rows(epilogue.tokens), group, epilogue);
}

}  // namespace
}  // namespace s24jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_relu2_ffn_y2, s24jax::relu2_ffn_y2,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // w_up
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(s24jax_relu2_ffn_dy1, s24jax::relu2_ffn_dy1,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy3
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // w_down
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // y2
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()  // dy1
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
