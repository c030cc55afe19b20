// apply on one contiguous run of elements, 32 at a time: p = fma(p, decay, -step).
#pragma once

#include <array>
#include <cstdint>

#include "simd/interface.h"
#include "simd/rounding.h"
#include "simd/target.h"
#include "simd/vec.h"
#include "simd/word.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

// kPlanes = 0: as many as the run says. kBlanks: some words may be blank.
template <bool kCautiousDecay, int kRounding, class P, int kPlanes, bool kBlanks>
void apply_planes(P* p_data, Low<kRounding, P>* low_data, int64_t n, const VerdictRun& verdict,
                  const RoundingRun& rounding) {
  const int n_planes = kPlanes == 0 ? verdict.n_planes : kPlanes;
  const uint32_t* const plane0 = verdict.plane0;
  const uint8_t* const blanks = verdict.blanks;
  const int64_t plane_stride = verdict.plane_stride;
  const Vec decay = fill(verdict.decay), step_size = fill(verdict.step_size);
  const Vec lowest = fill(-verdict.scale);
  for_each_word(
      n,
      [&](int64_t i, uint32_t, P* p_word, Low<kRounding, P>* low_word) {
        Vec sum[kVecs];  // 2 * v - scale, exact in float32
        for (int j = 0; j < kVecs; ++j) sum[j] = lowest;
        float weight = 2.0f;
        for (int b = 0; b < n_planes; ++b, weight *= 2.0f) {
          const uint32_t bits = plane0[b * plane_stride + i];
          for (int j = 0; j < kVecs; ++j)
            sum[j] = add_where(sum[j], bits >> (j * Vec::kLanes), fill(weight));
        }
        if (kBlanks && ((blanks[i / 8] >> (i % 8)) & 1) != 0)
          for (int j = 0; j < kVecs; ++j) sum[j] = fill(0.0f);
        for (int j = 0; j < kVecs; ++j) {
          const int at = j * Vec::kLanes;
          const Vec p = load_parameter<kRounding, P>(p_word + at, low_word + at);
          Vec kept = decay;
          if constexpr (kCautiousDecay)
            kept = select(negative(multiply(sum[j], p)), fill(1.0f), decay);
          sum[j] = fms(p, kept, multiply(step_size, sum[j]));
        }
        store_parameters<kRounding, P>(p_word, low_word, sum, rounding, i);
      },
      p_data, low_data);
}

template <bool kCautiousDecay, int kRounding, class P>
void apply_row(void* p_data, void* low_data, int64_t n, const VerdictRun& verdict,
               const RoundingRun& rounding) {
  P* p = static_cast<P*>(p_data);
  auto* low = static_cast<Low<kRounding, P>*>(low_data);
  const bool has_blanks = verdict.blanks != nullptr;  // which two planes of scale 2 have not
  if (verdict.n_planes == 1 && has_blanks)
    return apply_planes<kCautiousDecay, kRounding, P, 1, true>(p, low, n, verdict, rounding);
  if (verdict.n_planes == 2 && !has_blanks)
    return apply_planes<kCautiousDecay, kRounding, P, 2, false>(p, low, n, verdict, rounding);
  if (has_blanks)
    return apply_planes<kCautiousDecay, kRounding, P, 0, true>(p, low, n, verdict, rounding);
  apply_planes<kCautiousDecay, kRounding, P, 0, false>(p, low, n, verdict, rounding);
}

// float32 parameters drop nothing: theirs is one rounding.
template <bool kCautiousDecay, int kRounding>
constexpr std::array kAppliesOf{apply_row<kCautiousDecay, kNearest, float>,
                                apply_row<kCautiousDecay, kRounding, BF16>,
                                apply_row<kCautiousDecay, kRounding, F16>};
template <bool kCautiousDecay>
constexpr std::array kAppliesBy{kAppliesOf<kCautiousDecay, kNearest>,
                                kAppliesOf<kCautiousDecay, kStochastic>,
                                kAppliesOf<kCautiousDecay, kCompensated>};
constexpr std::array kApplies{kAppliesBy<false>, kAppliesBy<true>};

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
