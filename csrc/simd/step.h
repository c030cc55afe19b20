// lion_step and count_agreeing on one contiguous run of elements, 32 at a time: encode and apply in
// one pass, p = fma(p, decay, -lr * sign(c)).
#pragma once

#include <array>
#include <cstdint>

#include "simd/interface.h"
#include "simd/moments.h"
#include "simd/rounding.h"
#include "simd/target.h"
#include "simd/vec.h"
#include "simd/word.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

template <class G, class M>
int64_t agree_row(const void* g_data, const void* m_data, int64_t n, const LionScalars& scalars) {
  const Moments moments(scalars);
  int64_t agreeing = 0;
  for_each_word(
      n,
      [&](int64_t, uint32_t, const G* g_word, const M* m_word) {
        for (int j = 0; j < kVecs; ++j) {
          const Vec g = load(g_word + j * Vec::kLanes), m = load(m_word + j * Vec::kLanes);
          const Vec c = moments.update(g, m);
          uint32_t up = positive(c), down = negative(c);
          keep_agreeing(scalars, g, up, down);
          agreeing += __builtin_popcount(up | down);
        }
      },
      static_cast<const G*>(g_data), static_cast<const M*>(m_data));
  return agreeing;
}

template <bool kPlain, int kRounding, class P, class M>
int64_t step_row(void* p_data, const void* g_data, void* m_data, void* low_data, int64_t n,
                 const LionScalars& scalars, const RoundingRun& rounding) {
  const Moments moments(scalars);
  const Vec lr = fill(scalars.lr), decay = fill(scalars.decay);
  const Vec one = fill(1.0f), minus_one = fill(-1.0f);
  int64_t nonfinite = 0;
  for_each_word(
      n,
      [&](int64_t i, uint32_t, P* p_word, const P* g_word, M* m_word, Low<kRounding, P>* low_word) {
        Vec next_p[kVecs], next_m[kVecs];
        for (int j = 0; j < kVecs; ++j) {
          const int at = j * Vec::kLanes;
          const Vec p = load_parameter<kRounding, P>(p_word + at, low_word + at);
          const Vec g = load(g_word + j * Vec::kLanes), m = load(m_word + j * Vec::kLanes);
          const Vec c = moments.update(g, m);
          next_m[j] = moments.next(g, m);
          if constexpr (kPlain) {
            // Neither above nor below 0: a zero, or a NaN that must stay visible.
            const Vec sign = select(positive(c), one, select(negative(c), minus_one, c));
            next_p[j] = fms(p, decay, multiply(lr, sign));
          } else {
            uint32_t up = positive(c), down = negative(c);
            const uint32_t ok = finite(c), nan = ~(up | down | ok);
            if (scalars.cautious) keep_agreeing(scalars, g, up, down);
            const Vec sign = select(up, one, select(down, minus_one, select(nan, c, fill(0.0f))));
            Vec kept = decay;
            // Cautious weight decay (arXiv:2510.12402).
            if (scalars.cautious_decay) kept = select(negative(multiply(sign, p)), one, decay);
            next_p[j] = fms(p, kept, multiply(lr, sign));
            if (scalars.skip_nonfinite && ok != kAllLanes) {
              next_p[j] = select(ok, next_p[j], p);
              next_m[j] = select(ok, next_m[j], m);
              nonfinite += __builtin_popcount(kAllLanes & ~ok);
            }
          }
        }
        store_parameters<kRounding, P>(p_word, low_word, next_p, rounding, i);
        store_word(m_word, next_m);
      },
      static_cast<P*>(p_data), static_cast<const P*>(g_data), static_cast<M*>(m_data),
      static_cast<Low<kRounding, P>*>(low_data));
  return nonfinite;
}

template <class G>
constexpr std::array kAgreesOf{agree_row<G, float>, agree_row<G, BF16>, agree_row<G, F16>};
constexpr std::array kAgrees{kAgreesOf<float>, kAgreesOf<BF16>, kAgreesOf<F16>};

template <bool kPlain, int kRounding, class P>
constexpr std::array kStepsOf{step_row<kPlain, kRounding, P, float>,
                              step_row<kPlain, kRounding, P, BF16>,
                              step_row<kPlain, kRounding, P, F16>};
// float32 parameters drop nothing: theirs is one rounding.
template <bool kPlain, int kRounding>
constexpr std::array kStepsBy{kStepsOf<kPlain, kNearest, float>, kStepsOf<kPlain, kRounding, BF16>,
                              kStepsOf<kPlain, kRounding, F16>};
template <bool kPlain>
constexpr std::array kStepsFor{kStepsBy<kPlain, kNearest>, kStepsBy<kPlain, kStochastic>,
                               kStepsBy<kPlain, kCompensated>};
constexpr std::array kSteps{kStepsFor<true>, kStepsFor<false>};

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
