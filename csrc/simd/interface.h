// What a SIMD level does: its operations, each once, on plain pointers and one contiguous run of
// ballot words at a time.
//
// They are compiled once for each level (portable.cpp, avx2.cpp, avx512.cpp) and reached through
// that level's table. They know no tensors, lists, threads or ranks.
#pragma once

#include <array>
#include <cstdint>

#include "tally_run.h"

namespace lion {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };
constexpr int kNumDTypes = 3;  // those of the kernels: int8 momenta become float32 first

// How float32 parameters become their storage type; float32 storage always keeps them.
enum Rounding : int { kNearest = 0, kStochastic = 1, kCompensated = 2 };
constexpr int kNumRoundings = 3;

// Elements of an int8 momentum that share a scale.
constexpr int64_t kBlock = 128;

// The random bits of stochastic rounding.
struct RoundingRun {
  uint64_t key;
  uint64_t first_word;  // position of the run in the word space of its list
};

// Scalars of one call, rounded to float32 once, on the host.
struct LionScalars {
  float beta1, one_minus_beta1;  // the complements are negated for maximize
  float beta2, one_minus_beta2;
  float lr, decay;  // decay = 1 - lr * weight_decay
  // step only, which has kernels without any of them:
  bool skip_nonfinite;
  bool cautious;        // no update against the sign of the gradient
  bool cautious_decay;  // no decay against the update
  bool is_plain() const { return !skip_nonfinite && !cautious && !cautious_decay; }
};

// Where a run of words [first_word, ...) of the whole goes in a ballot.
struct BallotRun {
  uint32_t* plane0;
  uint32_t* plane1;     // null: binary ballot
  uint8_t* blanks;      // binary only: a bit a word, cleared
  uint64_t coin_key;    // binary only: replaces zero votes
  uint64_t first_word;  // position in word space, for the coins
  uint32_t flip;        // what coins are turned by
};

// Where a run of words lies in a verdict or tally.
struct VerdictRun {
  const uint32_t* plane0;
  int64_t plane_stride;   // words
  const uint8_t* blanks;  // a bit a word: no move; null where there are none
  int n_planes;
  float scale, step_size;  // step_size = lr / scale
  float decay;
};

template <class T>
using ByFlag = std::array<T, 2>;
template <class T>
using ByDType = std::array<T, kNumDTypes>;
template <class T>
using ByRounding = std::array<T, kNumRoundings>;

// n is the number of elements; it may end inside the last word.
struct SimdLevel {
  const char* name;

  // [cautious][gradient][momentum]. Returns the number of elements that were skipped because c was
  // not finite.
  ByFlag<ByDType<ByDType<int64_t (*)(const void* g, void* m, int64_t n, const LionScalars&,
                                     const BallotRun&)>>>
      encode;

  // [gradient][momentum]. Returns the number of elements where the sign of c is that of the
  // gradient.
  ByDType<ByDType<int64_t (*)(const void* g, const void* m, int64_t n, const LionScalars&)>> agree;

  // [not plain][rounding][parameter][momentum]. low: what the storage type of p dropped,
  // compensated rounding only. Returns what encode does.
  ByFlag<
      ByRounding<ByDType<ByDType<int64_t (*)(void* p, const void* g, void* m, void* low, int64_t n,
                                             const LionScalars&, const RoundingRun&)>>>>
      step;

  // [cautious decay][rounding][parameter].
  ByFlag<ByRounding<
      ByDType<void (*)(void* p, void* low, int64_t n, const VerdictRun&, const RoundingRun&)>>>
      apply;

  // int8 momenta, a run that starts a block, one scale a block.
  void (*dequantize)(const int8_t* q, const float* block_scales, int64_t n, float* m);
  void (*quantize)(const float* m, int64_t n, int8_t* q, float* block_scales);

  // Words [begin, end).
  void (*tally)(const TallyRun&, int64_t begin, int64_t end);
  void (*elect)(const TallyRun&, int64_t begin, int64_t end);
};

// Null where this build or this machine has no such level.
const SimdLevel* portable_level();
const SimdLevel* avx2_level();
const SimdLevel* avx512_level();

}  // namespace lion
