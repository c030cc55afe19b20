// As much of the CUDA runtime as csrc/cuda/tally.cu uses: a launch runs every thread in turn, here.
//
// For tests without a GPU. It shows what a kernel computes, not how fast, and no race: threads that
// communicate would need more.
#pragma once

#define LION_CUDA_SHIM

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Aligned as on the device: with -fsanitize=alignment a misaligned vector access is an error.
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
void __stcg(T* place, T value) {
  *place = value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
typedef void* cudaStream_t;

inline dim3 gridDim, blockDim, blockIdx, threadIdx;
inline int shim_launches = 0;

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args,
                             unsigned long /*shared_bytes*/, cudaStream_t /*stream*/) {
  if (grid.x == 0 || block.x == 0 || block.x > 1024) return cudaErrorInvalidConfiguration;
  ++shim_launches;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
      kernel(*static_cast<Args*>(args[0]));
  return cudaSuccess;
}
