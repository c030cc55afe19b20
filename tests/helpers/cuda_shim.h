// As much of the CUDA runtime as csrc/cuda/tally.cu uses: a launch runs every thread in turn, here.
//
// For tests without a GPU. It shows what a kernel computes, not how fast. A thread runs up to
// __syncthreads or its end before the next one starts: of races it shows those that this order has.
#pragma once

#include <ucontext.h>

#include <functional>
#include <vector>

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

// One thread of a block, on a stack of its own.
struct ShimThread {
  static constexpr int kStackBytes = 1 << 16;
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done;
};
inline ucontext_t shim_block;  // where a thread goes when it waits or ends
inline ShimThread* shim_thread;
inline std::function<void()> shim_kernel;

inline void __syncthreads() { swapcontext(&shim_thread->context, &shim_block); }

inline void shim_body() {
  shim_kernel();
  shim_thread->done = true;
}

inline void shim_run_block() {
  static std::vector<ShimThread> threads;
  if (threads.size() < blockDim.x) threads.resize(blockDim.x);
  for (unsigned i = 0; i < blockDim.x; ++i) {
    ShimThread& thread = threads[i];
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &shim_block;
    makecontext(&thread.context, shim_body, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
      shim_thread = &threads[threadIdx.x];
      if (shim_thread->done) continue;
      swapcontext(&shim_block, &shim_thread->context);
      running = true;
    }
  }
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args,
                             unsigned long /*shared_bytes*/, cudaStream_t /*stream*/) {
  if (grid.x == 0 || block.x == 0 || block.x > 1024) return cudaErrorInvalidConfiguration;
  ++shim_launches;
  gridDim = grid;
  blockDim = block;
  shim_kernel = [kernel, args] { kernel(*static_cast<Args*>(args[0])); };
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) shim_run_block();
  return cudaSuccess;
}
