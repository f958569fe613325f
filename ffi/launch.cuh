// Launches of kernels with one block per multiprocessor, in clusters.
#pragma once
#include <cuda_runtime.h>

namespace s24jax {

// How many blocks there can be at a time, in whole clusters, each with so much shared memory.
template <typename... Parameters>
cudaError_t most_blocks(void (*kernel)(Parameters...), int cluster, int shared_bytes, int* blocks) {
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(blocks, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    *blocks = *blocks / cluster * cluster;
  }
  return error;
}

template <typename... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, int blocks, int threads,
                            int shared_bytes, cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchAttribute of_cluster;
  of_cluster.id = cudaLaunchAttributeClusterDimension;
  of_cluster.val.clusterDim.x = cluster;
  of_cluster.val.clusterDim.y = of_cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &of_cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace s24jax
