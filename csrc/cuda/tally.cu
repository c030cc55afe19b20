// tally and elect on CUDA: one thread a vector of words, one pass over the ballots.
//
// Made to be bound by memory: a thread has eight 16-byte loads in flight before it counts them, and
// its counters are registers. All indices of arrays are known to the compiler, or they would lie in
// local memory. The arithmetic is that of the CPU kernels (bitplanes.h, coin.h).
#include <cstdint>

#include "bitplanes.h"
#include "coin.h"
#include "cuda/tally.h"
#include "tally_run.h"

namespace lion {
namespace {

constexpr int kThreads = 256;
constexpr int kBallotsAtOnce = 8;

// 128 bits of a plane: one load.
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
LION_HOST_DEVICE Words4 operator&(const Words4& a, const Words4& b) {
  return {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w};
}
LION_HOST_DEVICE Words4 operator|(const Words4& a, const Words4& b) {
  return {a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w};
}
LION_HOST_DEVICE Words4 operator^(const Words4& a, const Words4& b) {
  return {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
}
LION_HOST_DEVICE Words4 operator~(const Words4& a) { return {~a.x, ~a.y, ~a.z, ~a.w}; }

__device__ __forceinline__ void load(const uint32_t* words, uint32_t& word) { word = *words; }
__device__ __forceinline__ void load(const uint32_t* words, Words4& word) {
  // A struct of our own may be loaded in four pieces.
  const uint4 v = *reinterpret_cast<const uint4*>(words);
  word = {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ void store(uint32_t* words, const uint32_t& word) { *words = word; }
__device__ __forceinline__ void store(uint32_t* words, const Words4& word) {
  const uint4 v{word.x, word.y, word.z, word.w};
#if defined(__HIP_PLATFORM_AMD__)
  *reinterpret_cast<uint4*>(words) = v;
#else
  // A plain store of coins was four 4-byte stores for sm_80 and sm_90 (nvcc 13.0). This one keeps
  // the ordinary way of a store, through the L2 cache.
  __stcg(reinterpret_cast<uint4*>(words), v);
#endif
}

__device__ __forceinline__ void toss(uint64_t key, uint64_t w, uint32_t& word) {
  word = coins(key, w);
}
__device__ __forceinline__ void toss(uint64_t key, uint64_t w, Words4& word) {
  word = {coins(key, w), coins(key, w + 1), coins(key, w + 2), coins(key, w + 3)};
}

// Loads a Word of each of the next eight ballots; those behind the last are zeros. With predicated
// loads alone, nvcc 13.0 issues two at a time.
template <class Word>
__device__ __forceinline__ void load_eight(const uint32_t* words, int64_t stride, int64_t n_left,
                                           Word (&bits)[kBallotsAtOnce]) {
  if (n_left >= kBallotsAtOnce) {
#pragma unroll
    for (int r = 0; r < kBallotsAtOnce; ++r) load(words + r * stride, bits[r]);
  } else {
#pragma unroll
    for (int r = 0; r < kBallotsAtOnce; ++r) {
      bits[r] = Word{};
      if (r < n_left) load(words + r * stride, bits[r]);
    }
  }
}

// Sums the Word at word w of all ballots, plane after plane: with the planes in the inner loop the
// compiler keeps the address of every ballot of every plane in registers.
template <class Word, int kPlanes>
__device__ __forceinline__ void count(const TallyRun& run, int64_t w, Word (&counter)[kPlanes]) {
#pragma unroll
  for (int b = 0; b < kPlanes; ++b) counter[b] = Word{};
#pragma unroll
  for (int b = 0; b < kPlanes; ++b) {
    if (b == run.planes_in) break;
    const uint32_t* words = run.ballots + b * run.plane_stride + w;
    for (int64_t n_left = run.n_ballots; n_left > 0; n_left -= kBallotsAtOnce) {
      Word bits[kBallotsAtOnce];
      load_eight(words, run.ballot_stride, n_left, bits);
      add_eight_bits(counter, kPlanes, b, bits);
      words += kBallotsAtOnce * run.ballot_stride;
    }
  }
}

struct Tally {
  template <class Word, int kPlanes>
  static __device__ __forceinline__ void write(const CudaTally& task, int64_t w,
                                               const Word (&counter)[kPlanes]) {
    uint32_t* out = task.run.out + w;
#pragma unroll
    for (int b = 0; b < kPlanes; ++b)
      if (b < task.run.planes_out) store(out + b * task.run.out_stride, counter[b]);
  }
};

struct Elect {
  template <class Word, int kPlanes>
  static __device__ __forceinline__ void write(const CudaTally& task, int64_t w,
                                               const Word (&counter)[kPlanes]) {
    const TallyRun& run = task.run;
    uint32_t* out = run.out + w;
    Word won, tied;
    compare(counter, kPlanes, run.scale / 2, won, tied);
    if (run.scale % 2 != 0) {
      store(out, won);
    } else if (run.toss_ties) {
      const uint64_t key = mix64(run.coin_key ^ static_cast<uint64_t>(*task.step));
      Word coin;
      toss(key, run.first_word + static_cast<uint64_t>(w), coin);
      store(out, won | (tied & coin));
    } else {
      store(out, tied);
      store(out + run.out_stride, won);
    }
  }
};

// Blocks an SM must have registers for: at most 64, 80 and 128 registers a thread.
constexpr int blocks_per_sm(int n_planes) { return n_planes <= 4 ? 4 : n_planes <= 7 ? 3 : 2; }

// kPlanes is planes_out or more.
template <class Op, class Word, int kPlanes>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kPlanes))
    count_kernel(const CudaTally task) {
  constexpr int64_t kWords = sizeof(Word) / sizeof(uint32_t);
  const int64_t w = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWords;
  if (w + kWords > task.n_words) return;
  Word counter[kPlanes];
  count(task.run, w, counter);
  Op::write(task, w, counter);
}

using Kernel = void (*)(CudaTally);

// Scales below 4, 16 and 128, as on the CPU: 2 or 3 ranks, up to 15, up to 127.
template <class Op, class Word>
Kernel kernel_for(const TallyRun& run) {
  if (run.planes_out <= 2) return count_kernel<Op, Word, 2>;
  if (run.planes_out <= 4) return count_kernel<Op, Word, 4>;
  if (run.planes_out <= 7) return count_kernel<Op, Word, 7>;
  return count_kernel<Op, Word, kMaxPlanes>;
}

// Whether every vector of four words that a thread would touch starts at 16 bytes. The stride of a
// dimension of one element is never used and may be anything.
bool aligned(const TallyRun& run) {
  const auto place =
      reinterpret_cast<uintptr_t>(run.ballots) | reinterpret_cast<uintptr_t>(run.out);
  const int64_t strides = (run.n_ballots > 1 ? run.ballot_stride : 0) |
                          (run.planes_in > 1 ? run.plane_stride : 0) |
                          (run.planes_out > 1 ? run.out_stride : 0);
  return place % sizeof(Words4) == 0 && strides % 4 == 0;
}

template <class Op, class Word>
cudaError_t launch_words(CudaTally task, cudaStream_t stream) {
  constexpr int64_t kWordsPerBlock = kThreads * sizeof(Word) / sizeof(uint32_t);
  const int64_t n_blocks = (task.n_words + kWordsPerBlock - 1) / kWordsPerBlock;
  void* args[] = {&task};
  return cudaLaunchKernel(kernel_for<Op, Word>(task.run), dim3(static_cast<unsigned>(n_blocks)),
                          dim3(kThreads), args, 0, stream);
}

// Vectors where the layout allows them, then the words that fill no vector.
template <class Op>
cudaError_t launch(CudaTally task, cudaStream_t stream) {
  const int64_t n_vectors = aligned(task.run) ? task.n_words / 4 : 0;
  if (n_vectors > 0) {
    const cudaError_t status = launch_words<Op, Words4>(task, stream);
    if (status != cudaSuccess) return status;
  }
  const int64_t done = 4 * n_vectors;
  task.run.ballots += done;
  task.run.out += done;
  task.run.first_word += static_cast<uint64_t>(done);
  task.n_words -= done;
  if (task.n_words <= 0) return cudaSuccess;
  return launch_words<Op, uint32_t>(task, stream);
}

}  // namespace

cudaError_t launch_tally(const CudaTally& task, cudaStream_t stream) {
  return launch<Tally>(task, stream);
}
cudaError_t launch_elect(const CudaTally& task, cudaStream_t stream) {
  return launch<Elect>(task, stream);
}

}  // namespace lion
