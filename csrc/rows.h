// The CPU row kernels: plain pointers in, one contiguous run of ballot words at a time.
//
// They are compiled once for each SIMD level (rows_portable.cpp, rows_avx2.cpp, rows_avx512.cpp)
// and reached through the table of that level. They know no tensors, lists, threads or ranks.
#pragma once

#include <cstdint>

namespace lion {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };
constexpr int kNumDTypes = 3;  // those of the row kernels: int8 momenta become float32 first

// How float32 parameters become their storage type; float32 storage always keeps them.
enum Rounding : int { kNearest = 0, kStochastic = 1, kCompensated = 2 };
constexpr int kNumRoundings = 3;

// Elements of an int8 momentum that share a scale.
constexpr int64_t kBlock = 128;

// The random bits of stochastic rounding.
struct RoundingRun {
  uint64_t key;
  uint64_t first_word;  // position of the run in the group
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

// Where a run of words [first_word, ...) of the group goes in a ballot.
struct BallotRun {
  uint32_t* plane0;
  uint32_t* plane1;     // null: binary ballot
  uint64_t coin_key;    // binary only: replaces zero votes
  uint64_t first_word;  // position in the group, for the coins
};

// Where a run of words lies in a verdict or tally.
struct VerdictRun {
  const uint32_t* plane0;
  int64_t plane_stride;  // words
  int n_planes;
  float scale, step_size;  // step_size = lr / scale
  float decay;
};

struct TallyRows {
  const uint32_t* ballots;
  int64_t ballot_stride, plane_stride;  // words
  int64_t n_ballots;
  int planes_in, planes_out;
  uint32_t scale;  // of the sum
  uint32_t* out;
  int64_t out_stride;   // words
  bool toss_ties;       // elect only: one plane, even scale
  uint64_t coin_key;    // elect only
  uint64_t first_word;  // elect only: position of word 0 in the group
};

// n is the number of elements; it may end inside the last word. EncodeFn and StepFn return the
// number of elements that were skipped because c was not finite.
using EncodeFn = int64_t (*)(const void* g, void* m, int64_t n, const LionScalars&,
                             const BallotRun&);
// Elements where the sign of c is that of the gradient.
using AgreeFn = int64_t (*)(const void* g, const void* m, int64_t n, const LionScalars&);
// low: what the storage type of p dropped, compensated rounding only.
using StepFn = int64_t (*)(void* p, const void* g, void* m, void* low, int64_t n,
                           const LionScalars&, const RoundingRun&);
using ApplyFn = void (*)(void* p, void* low, int64_t n, const VerdictRun&, const RoundingRun&);
// int8 momenta, a run that starts a block, one scale a block.
using DequantizeFn = void (*)(const int8_t* q, const float* scales, int64_t n, float* m);
using QuantizeFn = void (*)(const float* m, int64_t n, int8_t* q, float* scales);
using TallyFn = void (*)(const TallyRows&, int64_t begin, int64_t end);

struct RowKernels {
  const char* name;
  EncodeFn encode[2][kNumDTypes][kNumDTypes];             // [cautious][gradient][momentum]
  AgreeFn agree[kNumDTypes][kNumDTypes];                  // [gradient][momentum]
  StepFn step[2][kNumRoundings][kNumDTypes][kNumDTypes];  // [not plain]..[parameter][momentum]
  ApplyFn apply[2][kNumRoundings][kNumDTypes];            // [cautious decay]..
  DequantizeFn dequantize;
  QuantizeFn quantize;
  TallyFn tally;
  TallyFn elect;
};

// Null where this build or this machine has no such level.
const RowKernels* portable_rows();
const RowKernels* avx2_rows();
const RowKernels* avx512_rows();

}  // namespace lion
