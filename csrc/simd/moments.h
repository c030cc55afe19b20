// What a gradient and a momentum become: c, whose sign is the vote, and the next momentum.
//
// The arithmetic of encode, step and agree stands here once: c = fma(1 - beta1, g, beta1 * m).
#pragma once

#include <cstdint>

#include "simd/interface.h"
#include "simd/target.h"
#include "simd/vec.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

struct Moments {
  Vec beta1, one_minus_beta1, beta2, one_minus_beta2;
  explicit Moments(const LionScalars& s)
      : beta1(fill(s.beta1)),
        one_minus_beta1(fill(s.one_minus_beta1)),
        beta2(fill(s.beta2)),
        one_minus_beta2(fill(s.one_minus_beta2)) {}
  Vec update(Vec g, Vec m) const { return fma(one_minus_beta1, g, multiply(beta1, m)); }
  Vec next(Vec g, Vec m) const { return fma(one_minus_beta2, g, multiply(beta2, m)); }
};

// Cautious Lion (arXiv:2411.16085): drops the lanes whose sign is not that of the gradient.
LION_INLINE void keep_agreeing(const LionScalars& s, const Vec& g, uint32_t& up, uint32_t& down) {
  const Vec slope = multiply(g, fill(s.one_minus_beta1 < 0.0f ? -1.0f : 1.0f));
  up &= positive(slope);
  down &= negative(slope);
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
