// Parameters in a 16-bit type that really train: stochastic and compensated rounding of a word.
//
// Stochastic: noise is added below the last kept bit and the rest cut off, so that the mean is
// exact. Compensated: a second tensor keeps what was dropped; for bf16 the pair is exactly the
// float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "coin.h"
#include "simd/interface.h"
#include "simd/target.h"
#include "simd/vec.h"
#include "simd/word.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

// The type of `low`: none, the 16 bits of a float32 below those of a bf16, or a second fp16.
template <int kRounding, class P>
struct LowOf {
  using type = const P;
};
template <>
struct LowOf<kCompensated, BF16> {
  using type = int16_t;
};
template <>
struct LowOf<kCompensated, F16> {
  using type = F16;
};
template <int kRounding, class P>
using Low = typename LowOf<kRounding, P>::type;

// k * 0x9E3779B9, modulo 2^32.
alignas(64) const uint32_t kLaneSteps[16] = {0x00000000u, 0x9E3779B9u, 0x3C6EF372u, 0xDAA66D2Bu,
                                             0x78DDE6E4u, 0x1715609Du, 0xB54CDA56u, 0x5384540Fu,
                                             0xF1BBCDC8u, 0x8FF34781u, 0x2E2AC13Au, 0xCC623AF3u,
                                             0x6A99B4ACu, 0x08D12E65u, 0xA708A81Eu, 0x454021D7u};

// 16 random bits for each of a word's 32 elements: one 64-bit hash a word, a 32-bit mixer (Wellons
// 2018, "lowbias32") for elements k and k + 16.
LION_INLINE void random_bits(const RoundingRun& run, int64_t i, WordVec (&out)[kVecs]) {
  const uint64_t hash = mix64(run.key + (run.first_word + static_cast<uint64_t>(i)) * kGamma);
  constexpr int kHalf = kVecs / 2;
  for (int j = 0; j < kHalf; ++j) {
    WordVec x;
    std::memcpy(&x, kLaneSteps + j * Vec::kLanes, sizeof(x));
    x = x + static_cast<uint32_t>(hash);
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x = x ^ (x >> 16) ^ static_cast<uint32_t>(hash >> 32);
    out[j] = x & 0xFFFFu;
    out[j + kHalf] = x >> 16;
  }
}

// a to a neighbour that the storage type has, up or down at random; infinities and NaN stay.
LION_INLINE void round_at_random(const BF16*, Vec& a, const WordVec& random) {
  Vec rounded;
  set_bits(rounded, (bits_of(a) + random) & 0xFFFF0000u);
  a = select(finite(a), rounded, a);
}
// Below 2^-14 fp16 has a fixed point: multiples of 2^-24. Only such numbers are converted, others
// may not fit.
LION_INLINE Vec round_tiny_at_random(const Vec& a, const WordVec& noise, uint32_t is_tiny) {
  const FloatVec units =
      bit_cast<FloatVec>(bits_of(select(is_tiny, magnitude(a), Vec{}))) * 0x1p24f +
      __builtin_convertvector(bit_cast<IntVec>(noise), FloatVec) * 0x1p-13f;
  const FloatVec cut =
      __builtin_convertvector(__builtin_convertvector(units, IntVec), FloatVec) * 0x1p-24f;
  Vec out;
  set_bits(out, bit_cast<WordVec>(cut) | (bits_of(a) & 0x80000000u));
  return out;
}
LION_INLINE void round_at_random(const F16*, Vec& a, const WordVec& random) {
  const WordVec noise = random & 0x1FFFu;
  Vec rounded;
  set_bits(rounded, (bits_of(a) + noise) & 0xFFFFE000u);
  const uint32_t is_tiny = negative(fma(magnitude(a), fill(1.0f), fill(-0x1p-14f)));
  if (is_tiny != 0) rounded = select(is_tiny, round_tiny_at_random(a, noise, is_tiny), rounded);
  a = select(finite(a), rounded, a);
}

template <int kRounding, class P>
LION_INLINE Vec load_parameter(const P* p, const Low<kRounding, P>*) {
  return load(p);
}
template <>
LION_INLINE Vec load_parameter<kCompensated, BF16>(const BF16* p, const int16_t* low) {
  ShortVec dropped;
  std::memcpy(&dropped, low, sizeof(dropped));
  Vec a = load(p);
  set_bits(a, bits_of(a) + bit_cast<WordVec>(__builtin_convertvector(dropped, IntVec)));
  return a;
}
template <>
LION_INLINE Vec load_parameter<kCompensated, F16>(const F16* p, const F16* low) {
  return fma(load(p), fill(1.0f), load(low));
}

// Stores values that P can hold: for bf16 the upper halves, without rounding them again.
template <class P>
LION_INLINE void store_exact(P* p, const Vec (&a)[kVecs]) {
  store_word(p, a);
}
#if defined(LION_SIMD_AVX512)
LION_INLINE void store_exact(BF16* p, const Vec (&a)[2]) {
  store_upper_halves(p, _mm512_castps_si512(a[0].v), _mm512_castps_si512(a[1].v));
}
#endif

// Stores the 32 parameters of word i of the run.
template <int kRounding, class P>
LION_INLINE void store_parameters(P* p, Low<kRounding, P>* low, Vec (&a)[kVecs],
                                  const RoundingRun& run, int64_t i) {
  if constexpr (kRounding == kStochastic) {
    WordVec random[kVecs];
    random_bits(run, i, random);
    for (int j = 0; j < kVecs; ++j) round_at_random(p, a[j], random[j]);
    store_exact(p, a);
  } else if constexpr (kRounding == kCompensated && std::is_same_v<P, BF16>) {
    for (int j = 0; j < kVecs; ++j) {
      // Ties go away from zero, so that what is dropped fits 16 bits with a sign.
      const WordVec bits = bits_of(a[j]), kept = (bits + 0x8000u) & 0xFFFF0000u;
      const uint32_t ok = finite(a[j]);
      Vec rounded, dropped;
      set_bits(rounded, kept);
      set_bits(dropped, bits - kept);
      a[j] = select(ok, rounded, a[j]);
      dropped = select(ok, dropped, Vec{});
      const ShortVec out = __builtin_convertvector(bit_cast<IntVec>(bits_of(dropped)), ShortVec);
      std::memcpy(low + j * Vec::kLanes, &out, sizeof(out));
    }
    store_exact(p, a);
  } else if constexpr (kRounding == kCompensated) {
    store_word(p, a);
    for (int j = 0; j < kVecs; ++j) {
      const Vec dropped = fms(a[j], fill(1.0f), load(p + j * Vec::kLanes));
      a[j] = select(finite(dropped), dropped, Vec{});
    }
    store_word(low, a);
  } else {
    store_word(p, a);
  }
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
