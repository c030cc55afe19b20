// tally and elect on CUDA: one thread a vector of words, one pass over the ballots.
//
// Made to be bound by memory: a thread has eight 16-byte loads in flight before it counts them, and
// its counters are registers. All indices of arrays are known to the compiler, or they would lie in
// local memory. The arithmetic is that of the CPU kernels (bitplanes.h, coin.h).
//
// The result may lie where the ballots lie, a verdict's planes in the planes of some ballots, and
// out_blanks in blanks: a thread writes its words after it has read them of all ballots, and a byte
// of blank bits when every thread that shares it has.
#include <cstdint>

#include "bitplanes.h"
#include "coin.h"
#include "cuda/tally.h"
#include "tally_run.h"

namespace lion {
namespace {

constexpr int kThreads = 256;
constexpr int kBallotsAtOnce = 8;
constexpr int64_t kOctet = 8;  // words whose blank bits are one byte

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

__device__ __forceinline__ void load(const uint8_t* bytes, uint32_t& byte) { byte = *bytes; }
__device__ __forceinline__ void load(const int32_t* weights, uint32_t& weight) {
  weight = static_cast<uint32_t>(*weights);
}
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

// All ones in the words whose bits are set.
__device__ __forceinline__ void spread(uint32_t bits, uint32_t& word) { word = 0u - (bits & 1u); }
__device__ __forceinline__ void spread(uint32_t bits, Words4& word) {
  word = {0u - (bits & 1u), 0u - (bits >> 1 & 1u), 0u - (bits >> 2 & 1u), 0u - (bits >> 3 & 1u)};
}

// Calls load(r) for each of the next eight ballots that is there. With predicated loads alone, nvcc
// 13.0 issues two at a time; all that is loaded of a ballot belongs into one call, or it waits for
// what another loaded.
template <class Load>
__device__ __forceinline__ void load_eight(int64_t n_left, const Load& load) {
  if (n_left >= kBallotsAtOnce) {
#pragma unroll
    for (int r = 0; r < kBallotsAtOnce; ++r) load(r);
  } else {
#pragma unroll
    for (int r = 0; r < kBallotsAtOnce; ++r)
      if (r < n_left) load(r);
  }
}

// Of the Word at word w, which lies in one octet.
template <class Word, int kPlanes>
struct Sum {
  Word planes[kPlanes];
  // A bit for each word of the octet, as TallyRun::blanks has them: whether half a vote is left
  // over (bitplanes.h), and whether all ballots left the word blank.
  uint32_t odd, all;

  __device__ __forceinline__ Sum() : odd(0), all(0) {
#pragma unroll
    for (int b = 0; b < kPlanes; ++b) planes[b] = Word{};
  }
};

// Ballots of any number of planes, with no blank words: plane after plane. With the planes in the
// inner loop the compiler keeps the address of every ballot of every plane in registers.
struct Whole {
  static constexpr bool kBlanks = false;

  template <class Word, int kPlanes>
  static __device__ __forceinline__ void count(const TallyRun& run, int64_t w,
                                               Sum<Word, kPlanes>& sum) {
#pragma unroll
    for (int b = 0; b < kPlanes; ++b) {
      if (b == run.planes_in) break;
      const uint32_t* words = run.ballots + b * run.plane_stride + w;
      for (int64_t n_left = run.n_ballots; n_left > 0; n_left -= kBallotsAtOnce) {
        Word bits[kBallotsAtOnce] = {};
        load_eight(n_left, [&](int r) { load(words + r * run.ballot_stride, bits[r]); });
        add_eight_bits(sum.planes, kPlanes, b, bits);
        words += kBallotsAtOnce * run.ballot_stride;
      }
    }
  }
};

// Ballots of one plane with blank words. Few are blank, or whole rows are: most threads see none.
struct Blank {
  static constexpr bool kBlanks = true;

  template <class Word, int kPlanes>
  static __device__ __forceinline__ void count(const TallyRun& run, int64_t w,
                                               Sum<Word, kPlanes>& sum) {
    const uint32_t* words = run.ballots + w;
    const uint8_t* blanks = run.blanks + w / kOctet;
    sum.all = ~0u;
    for (int64_t n_left = run.n_ballots; n_left > 0; n_left -= kBallotsAtOnce) {
      uint32_t blank[kBallotsAtOnce] = {};
      Word bits[kBallotsAtOnce] = {};
      load_eight(n_left, [&](int r) {
        load(blanks + r * run.blank_stride, blank[r]);
        load(words + r * run.ballot_stride, bits[r]);
      });
      uint32_t any = 0;
#pragma unroll
      for (int r = 0; r < kBallotsAtOnce; ++r) any |= blank[r];
      if (any == 0) {
        sum.all = 0;
      } else {
        const auto place = static_cast<unsigned>(w % kOctet);
#pragma unroll
        for (int r = 0; r < kBallotsAtOnce; ++r) {
          uint32_t pairs = 0;
          pair_halves(blank[r], sum.odd, pairs);
          Word is_blank, is_pair;
          spread(blank[r] >> place, is_blank);
          spread(pairs >> place, is_pair);
          bits[r] = (bits[r] & ~is_blank) | is_pair;
          if (r < n_left) sum.all &= blank[r];
        }
      }
      add_eight_bits(sum.planes, kPlanes, 0, bits);
      words += kBallotsAtOnce * run.ballot_stride;
      blanks += kBallotsAtOnce * run.blank_stride;
    }
  }
};

// Ballots with weights, or blank words where no vectors are: a full adder a ballot and plane.
struct Weighted {
  static constexpr bool kBlanks = true;

  template <int kPlanes>
  static __device__ __forceinline__ void count(const TallyRun& run, int64_t w,
                                               Sum<uint32_t, kPlanes>& sum) {
    const auto place = static_cast<unsigned>(w % kOctet);
    const bool blanks = run.blanks != nullptr, weights = run.weights != nullptr;
    sum.all = blanks ? ~0u : 0;
    for (int b = 0; b < run.planes_in; ++b) {
      for (int64_t first = 0; first < run.n_ballots; first += kBallotsAtOnce) {
        const int64_t n_left = run.n_ballots - first;
        const uint32_t* words = run.ballots + first * run.ballot_stride + b * run.plane_stride + w;
        uint32_t bits[kBallotsAtOnce] = {}, blank[kBallotsAtOnce] = {}, weight[kBallotsAtOnce] = {};
        load_eight(n_left, [&](int r) {
          load(words + r * run.ballot_stride, bits[r]);
          weight[r] = 1;
          if (weights) load(run.weights + first + r, weight[r]);
          if (blanks) load(run.blanks + (first + r) * run.blank_stride + w / kOctet, blank[r]);
        });
#pragma unroll
        for (int r = 0; r < kBallotsAtOnce; ++r) {
          uint32_t is_blank, odd;
          spread(blank[r] >> place, is_blank);
          spread(sum.odd >> place, odd);
          // Not at level b, which the compiler does not know.
          add_weighted(sum.planes, kPlanes, 0, weight[r] << b, is_blank, odd, bits[r]);
          if (weight[r] % 2 != 0) sum.odd ^= blank[r];
          if (r < n_left) sum.all &= blank[r];
        }
      }
    }
  }
};

template <class Word>
__device__ __forceinline__ Word coins_at(const CudaTally& task, int64_t w) {
  const uint64_t key = mix64(task.run.coin_key ^ static_cast<uint64_t>(*task.step));
  Word coin;
  toss(key, task.run.first_word + static_cast<uint64_t>(w), coin);
  return coin;
}

// `odd`: where half a vote is left over. `hidden`: words that become 0.
struct Tally {
  template <class Word, int kPlanes>
  static __device__ __forceinline__ void write(const CudaTally& task, int64_t w,
                                               Sum<Word, kPlanes>& sum, const Word& odd,
                                               const Word& hidden) {
    if (sum.odd != 0) add_bit(sum.planes, kPlanes, 0, odd & coins_at<Word>(task, w));
    uint32_t* out = task.run.out + w;
#pragma unroll
    for (int b = 0; b < kPlanes; ++b)
      if (b < task.run.planes_out) store(out + b * task.run.out_stride, sum.planes[b] & ~hidden);
  }
};

struct Elect {
  template <class Word, int kPlanes>
  static __device__ __forceinline__ void write(const CudaTally& task, int64_t w,
                                               Sum<Word, kPlanes>& sum, const Word& odd,
                                               const Word& hidden) {
    const TallyRun& run = task.run;
    uint32_t* out = run.out + w;
    Word won, tied;
    compare_with_half(sum.planes, kPlanes, run.scale, odd, won, tied);
    if (!run.toss_ties) {
      store(out, tied);
      store(out + run.out_stride, won);
      return;
    }
    if (run.scale % 2 == 0 || sum.odd != 0) won = won | (tied & coins_at<Word>(task, w));
    store(out, won & ~hidden);
  }
};

// The byte of an octet is written by the thread of its first word, the padding by that of the last
// octet's.
__device__ __forceinline__ void write_blanks(const CudaTally& task, int64_t w, uint32_t all) {
  const int64_t n_left = task.n_words - w;
  if (w % kOctet != 0) return;
  if (n_left < kOctet) all &= (1u << n_left) - 1u;
  task.run.out_blanks[w / kOctet] = static_cast<uint8_t>(all);
  if (n_left > kOctet) return;
#pragma unroll 1
  for (int64_t k = w / kOctet + 1; k < task.run.out_blank_bytes; ++k) task.run.out_blanks[k] = 0;
}

// Blocks an SM must have registers for: at most 64, 80 and 128 registers a thread. Blank bits and
// what is kept of them take those of three planes.
constexpr int blocks_per_sm(int n_planes, bool blanks) {
  const int room = blanks ? n_planes + 3 : n_planes;
  return room <= 4 ? 4 : room <= 7 ? 3 : 2;
}

// kPlanes is planes_out or more.
template <class Op, class Ballots, class Word, int kPlanes>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kPlanes, Ballots::kBlanks))
    count_kernel(const CudaTally task) {
  constexpr int64_t kWords = sizeof(Word) / sizeof(uint32_t);
  const int64_t w = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWords;
  if (w + kWords > task.n_words) return;
  Sum<Word, kPlanes> sum;
  Ballots::count(task.run, w, sum);
  const bool hides = Ballots::kBlanks && task.run.out_blanks != nullptr;
  const auto place = static_cast<unsigned>(w % kOctet);
  Word odd, hidden;
  spread(sum.odd >> place, odd);
  spread(hides ? sum.all >> place : 0, hidden);
  Op::write(task, w, sum, odd, hidden);
  if (hides) {
    __syncthreads();  // An octet lies in one block.
    write_blanks(task, w, sum.all);
  }
}

using Kernel = void (*)(CudaTally);

// Scales below 4, 16 and 128, as on the CPU: 2 or 3 ranks, up to 15, up to 127.
template <class Op, class Ballots, class Word>
Kernel kernel_for(const TallyRun& run) {
  if (run.planes_out <= 2) return count_kernel<Op, Ballots, Word, 2>;
  if (run.planes_out <= 4) return count_kernel<Op, Ballots, Word, 4>;
  if (run.planes_out <= 7) return count_kernel<Op, Ballots, Word, 7>;
  return count_kernel<Op, Ballots, Word, kMaxPlanes>;
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

cudaError_t launch_words(Kernel kernel, CudaTally task, int64_t words_a_thread,
                         cudaStream_t stream) {
  const int64_t words_a_block = kThreads * words_a_thread;
  const int64_t n_blocks = (task.n_words + words_a_block - 1) / words_a_block;
  void* args[] = {&task};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(n_blocks)), dim3(kThreads), args, 0,
                          stream);
}

// Vectors where the layout allows them, then the words that fill no octet.
template <class Op>
cudaError_t launch(CudaTally task, cudaStream_t stream) {
  TallyRun& run = task.run;
  const int64_t n_octets = aligned(run) && run.weights == nullptr ? task.n_words / kOctet : 0;
  const int64_t n_words = n_octets * kOctet;
  if (n_words > 0) {
    CudaTally vectors = task;
    vectors.n_words = n_words;
    if (n_words < task.n_words) vectors.run.out_blank_bytes = n_octets;
    const Kernel kernel = run.blanks == nullptr ? kernel_for<Op, Whole, Words4>(run)
                                                : kernel_for<Op, Blank, Words4>(run);
    const cudaError_t status = launch_words(kernel, vectors, 4, stream);
    if (status != cudaSuccess || n_words == task.n_words) return status;
  }
  run.ballots += n_words;
  run.out += n_words;
  run.first_word += static_cast<uint64_t>(n_words);
  if (run.blanks != nullptr) run.blanks += n_octets;
  if (run.out_blanks != nullptr) run.out_blanks += n_octets;
  run.out_blank_bytes -= n_octets;
  task.n_words -= n_words;
  if (task.n_words == 0) return cudaSuccess;
  const bool plain = run.blanks == nullptr && run.weights == nullptr;
  const Kernel kernel =
      plain ? kernel_for<Op, Whole, uint32_t>(run) : kernel_for<Op, Weighted, uint32_t>(run);
  return launch_words(kernel, task, 1, stream);
}

}  // namespace

cudaError_t launch_tally(const CudaTally& task, cudaStream_t stream) {
  return launch<Tally>(task, stream);
}
cudaError_t launch_elect(const CudaTally& task, cudaStream_t stream) {
  return launch<Elect>(task, stream);
}

}  // namespace lion
