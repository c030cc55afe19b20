// encode on one contiguous run of elements, 32 at a time: the votes of one ballot word.
#pragma once

#include <array>
#include <cstdint>

#include "coin.h"
#include "simd/interface.h"
#include "simd/moments.h"
#include "simd/target.h"
#include "simd/vec.h"
#include "simd/word.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

template <bool kCautious, class G, class M>
int64_t encode_row(const void* g_data, void* m_data, int64_t n, const LionScalars& scalars,
                   const BallotRun& ballot) {
  const Moments moments(scalars);
  int64_t nonfinite = 0;
  for_each_word(
      n,
      [&](int64_t i, uint32_t valid, const G* g_word, M* m_word) {
        uint32_t plus = 0, minus = 0;
        Vec next[kVecs];
        for (int j = 0; j < kVecs; ++j) {
          const Vec g = load(g_word + j * Vec::kLanes), m = load(m_word + j * Vec::kLanes);
          const Vec c = moments.update(g, m);
          const uint32_t ok = finite(c);
          next[j] = moments.next(g, m);
          if (ok != kAllLanes) {
            next[j] = select(ok, next[j], m);
            nonfinite += __builtin_popcount(kAllLanes & ~ok);
          }
          uint32_t up = positive(c) & ok, down = negative(c) & ok;
          if constexpr (kCautious) keep_agreeing(scalars, g, up, down);
          plus |= up << (j * Vec::kLanes);
          minus |= down << (j * Vec::kLanes);
        }
        store_word(m_word, next);
        const uint32_t zero = valid & ~(plus | minus);
        if (ballot.plane1 != nullptr) {
          ballot.plane0[i] = zero;
          ballot.plane1[i] = plus;
        } else {
          ballot.plane0[i] =
              zero == 0 ? plus : plus | (zero & coins(ballot.coin_key, ballot.first_word + i));
        }
      },
      static_cast<const G*>(g_data), static_cast<M*>(m_data));
  return nonfinite;
}

template <bool kCautious, class G>
constexpr std::array kEncodesOf{encode_row<kCautious, G, float>, encode_row<kCautious, G, BF16>,
                                encode_row<kCautious, G, F16>};
template <bool kCautious>
constexpr std::array kEncodesBy{kEncodesOf<kCautious, float>, kEncodesOf<kCautious, BF16>,
                                kEncodesOf<kCautious, F16>};
constexpr std::array kEncodes{kEncodesBy<false>, kEncodesBy<true>};

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
