// The few vector operations that the kernels are written in, for the SIMD level of target.h.
//
// Storage is float, bf16 or fp16, at any address; arithmetic is float32; every conversion rounds to
// nearest even.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd/target.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the bits");
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

#if defined(LION_SIMD_AVX512)

constexpr int kBlockBytes = 64;

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

LION_INLINE Vec fill(float x) { return {_mm512_set1_ps(x)}; }
LION_INLINE Vec load(const float* x) { return {_mm512_loadu_ps(x)}; }
LION_INLINE Vec load(const BF16* x) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
LION_INLINE Vec load(const F16* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}
LION_INLINE Vec load(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
LION_INLINE void store(float* x, Vec a) { _mm512_storeu_ps(x, a.v); }
// bf16 in the upper halves of the lanes, rounded to nearest even; NaN is not told apart.
LION_INLINE __m512i round_to_bf16(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
LION_INLINE __m512i keep_nan(__m512i rounded, __m512 a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
LION_INLINE void store_upper_halves(BF16* x, __m512i low, __m512i high) {
  const __m512i upper_halves =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(x, _mm512_permutex2var_epi16(low, upper_halves, high));
}
// 32 at once: one look for NaN, one permutation and one store for two vectors. Per vector, the
// conversion bound the bf16 kernels instead of the memory.
LION_INLINE void store_word(BF16* x, const Vec (&a)[2]) {
  __m512i low = round_to_bf16(a[0].v), high = round_to_bf16(a[1].v);
  if (_mm512_cmp_ps_mask(a[0].v, a[1].v, _CMP_UNORD_Q) != 0) {
    low = keep_nan(low, a[0].v);
    high = keep_nan(high, a[1].v);
  }
  store_upper_halves(x, low, high);
}
LION_INLINE void store(F16* x, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Values in [-128, 127], rounded to nearest even.
LION_INLINE void store(int8_t* x, Vec a) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), bytes);
}
LION_INLINE Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// The larger of two that are not negative; a NaN is the largest of all.
LION_INLINE Vec maximum(Vec a, Vec b) {
  const __m512i largest = _mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v));
  return {_mm512_castsi512_ps(largest)};
}
LION_INLINE float largest(Vec a) {
  return bit_cast<float>(_mm512_reduce_max_epi32(_mm512_castps_si512(a.v)));
}
LION_INLINE Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LION_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a * b - c
LION_INLINE Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
LION_INLINE uint32_t positive(Vec a) {
  return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ);
}
LION_INLINE uint32_t negative(Vec a) {
  return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ);
}
LION_INLINE uint32_t finite(Vec a) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
}
// a where the lane's bit is set, else b.
LION_INLINE Vec select(uint32_t bits, Vec a, Vec b) {
  return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v)};
}
LION_INLINE Vec add_where(Vec a, uint32_t bits, Vec b) {
  return {_mm512_mask_add_ps(a.v, static_cast<__mmask16>(bits), a.v, b.v)};
}

#elif defined(LION_SIMD_AVX2)

constexpr int kBlockBytes = 32;

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

LION_INLINE Vec fill(float x) { return {_mm256_set1_ps(x)}; }
LION_INLINE Vec load(const float* x) { return {_mm256_loadu_ps(x)}; }
LION_INLINE Vec load(const BF16* x) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
LION_INLINE Vec load(const F16* x) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
LION_INLINE Vec load(const int8_t* x) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
LION_INLINE void store(float* x, Vec a) { _mm256_storeu_ps(x, a.v); }
LION_INLINE void store(BF16* x, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m128i low = _mm256_castsi256_si128(rounded);
  const __m128i high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm_packus_epi32(low, high));
}
LION_INLINE void store(F16* x, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LION_INLINE void store(int8_t* x, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_packs_epi16(halves, halves));
}
LION_INLINE Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
LION_INLINE Vec maximum(Vec a, Vec b) {
  const __m256i largest = _mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v));
  return {_mm256_castsi256_ps(largest)};
}
LION_INLINE float largest(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return bit_cast<float>(_mm_cvtsi128_si32(half));
}
LION_INLINE Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
LION_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LION_INLINE Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
LION_INLINE uint32_t lane_bits(__m256 mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(mask));
}
LION_INLINE __m256 lane_mask(uint32_t bits) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i spread = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(spread, lanes));
}
LION_INLINE uint32_t positive(Vec a) {
  return lane_bits(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ));
}
LION_INLINE uint32_t negative(Vec a) {
  return lane_bits(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_LT_OQ));
}
LION_INLINE uint32_t finite(Vec a) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
  return lane_bits(_mm256_cmp_ps(magnitude, _mm256_set1_ps(INFINITY), _CMP_LT_OQ));
}
LION_INLINE Vec select(uint32_t bits, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, lane_mask(bits))};
}
LION_INLINE Vec add_where(Vec a, uint32_t bits, Vec b) {
  return {_mm256_add_ps(a.v, _mm256_and_ps(lane_mask(bits), b.v))};
}

#else

constexpr int kBlockBytes = 16;

// The vector types of GCC and Clang: each operation becomes what the baseline has.
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));  // a comparison's: 0 or -1 a lane
typedef uint64_t LongWords __attribute__((vector_size(32)));
typedef uint16_t HalfWords __attribute__((vector_size(8)));
typedef int8_t Bytes __attribute__((vector_size(4)));

struct Vec {
  static constexpr int kLanes = 4;
  Floats v;
};

LION_INLINE Vec fill(float x) { return {x - Floats{}}; }
LION_INLINE Vec load(const float* x) {
  Vec out;
  std::memcpy(&out.v, x, sizeof(out.v));
  return out;
}
LION_INLINE Vec load(const BF16* x) {
  HalfWords bits;
  std::memcpy(&bits, x, sizeof(bits));
  return {bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16)};
}
LION_INLINE Vec load(const F16* x) {
  HalfWords bits;
  std::memcpy(&bits, x, sizeof(bits));
  Vec out;
  for (int k = 0; k < Vec::kLanes; ++k)
    out.v[k] = torch::headeronly::detail::fp16_ieee_to_fp32_value(bits[k]);
  return out;
}
LION_INLINE Vec load(const int8_t* x) {
  Bytes bytes;
  std::memcpy(&bytes, x, sizeof(bytes));
  return {__builtin_convertvector(bytes, Floats)};
}
LION_INLINE void store(float* x, Vec a) { std::memcpy(x, &a.v, sizeof(a.v)); }
LION_INLINE void store(BF16* x, Vec a) {
  const Words bits = bit_cast<Words>(a.v);
  const Words nan = bit_cast<Words>(a.v != a.v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan;
  const HalfWords out = __builtin_convertvector((rounded | (nan & 0x7fc00000u)) >> 16, HalfWords);
  std::memcpy(x, &out, sizeof(out));
}
LION_INLINE void store(F16* x, Vec a) {
  HalfWords bits;
  for (int k = 0; k < Vec::kLanes; ++k)
    bits[k] = torch::headeronly::detail::fp16_ieee_from_fp32_value(a.v[k]);
  std::memcpy(x, &bits, sizeof(bits));
}
LION_INLINE void store(int8_t* x, Vec a) {
  // Added to 1.5 * 2^23, a float32 keeps no fraction.
  const Floats whole = (a.v + 12582912.0f) - 12582912.0f;
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(whole, Mask), Bytes);
  std::memcpy(x, &bytes, sizeof(bytes));
}
LION_INLINE Vec square_root(Vec a) {
  Vec out;
  for (int k = 0; k < Vec::kLanes; ++k) out.v[k] = __builtin_sqrtf(a.v[k]);
  return out;
}
LION_INLINE Vec maximum(Vec a, Vec b) {
  const Mask x = bit_cast<Mask>(a.v), y = bit_cast<Mask>(b.v), is_larger = x > y;
  return {bit_cast<Floats>((x & is_larger) | (y & ~is_larger))};
}
LION_INLINE float largest(Vec a) {
  const Mask bits = bit_cast<Mask>(a.v);
  int32_t out = bits[0];
  for (int k = 1; k < Vec::kLanes; ++k) out = bits[k] > out ? bits[k] : out;
  return bit_cast<float>(out);
}
LION_INLINE Vec multiply(Vec a, Vec b) { return {a.v * b.v}; }
LION_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  Vec out;
  for (int k = 0; k < Vec::kLanes; ++k) out.v[k] = __builtin_fmaf(a.v[k], b.v[k], c.v[k]);
  return out;
#else
  // Without the instruction: the product of two floats is exact in double, and a double sum that is
  // rounded to odd can be rounded to float as if it were exact (Boldo and Melquiond 2008,
  // doi:10.1109/TC.2007.70819).
  const Doubles x = __builtin_convertvector(a.v, Doubles) * __builtin_convertvector(b.v, Doubles);
  const Doubles y = __builtin_convertvector(c.v, Doubles), sum = x + y;
  const Doubles from_x = sum - y, from_y = sum - from_x;
  const Doubles error = (x - from_x) + (y - from_y);
  const LongWords bits = bit_cast<LongWords>(sum), error_bits = bit_cast<LongWords>(error);
  // 1 where the sum is inexact; 0 for infinities and NaN, whose error is NaN.
  const LongWords inexact = bit_cast<LongWords>((error < 0.0) | (error > 0.0)) & 1u;
  const LongWords away_from_zero = (error_bits ^ bits) >> 63;
  const LongWords odd = (bits - (away_from_zero & inexact)) | inexact;
  return {__builtin_convertvector(bit_cast<Doubles>(odd), Floats)};
#endif
}
LION_INLINE Vec fms(Vec a, Vec b, Vec c) { return fma(a, b, {-c.v}); }
LION_INLINE uint32_t lane_bits(Mask mask) {
  const Mask bit = mask & Mask{1, 2, 4, 8};
  uint32_t out = 0;
  for (int k = 0; k < Vec::kLanes; ++k) out |= static_cast<uint32_t>(bit[k]);
  return out;
}
inline Mask lane_mask(uint32_t bits) {
  const Mask lane{1, 2, 4, 8};
  return ((lane & static_cast<int32_t>(bits)) == lane);
}
LION_INLINE uint32_t positive(Vec a) { return lane_bits(a.v > 0.0f); }
LION_INLINE uint32_t negative(Vec a) { return lane_bits(a.v < 0.0f); }
LION_INLINE uint32_t finite(Vec a) { return lane_bits(a.v - a.v == 0.0f); }
LION_INLINE Vec select(uint32_t bits, Vec a, Vec b) {
  const Words mask = bit_cast<Words>(lane_mask(bits));
  return {bit_cast<Floats>((bit_cast<Words>(a.v) & mask) | (bit_cast<Words>(b.v) & ~mask))};
}
LION_INLINE Vec add_where(Vec a, uint32_t bits, Vec b) {
  return {a.v + bit_cast<Floats>(bit_cast<Mask>(b.v) & lane_mask(bits))};
}

#endif

// Every level's, in the vector types of GCC and Clang.
typedef uint32_t WordVec __attribute__((vector_size(4 * Vec::kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * Vec::kLanes)));
typedef float FloatVec __attribute__((vector_size(4 * Vec::kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(2 * Vec::kLanes)));

inline WordVec bits_of(const Vec& a) { return bit_cast<WordVec>(a.v); }
LION_INLINE void set_bits(Vec& a, const WordVec& bits) { a.v = bit_cast<decltype(a.v)>(bits); }
LION_INLINE Vec magnitude(const Vec& a) {
  Vec out;
  set_bits(out, bits_of(a) & 0x7FFFFFFFu);
  return out;
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
