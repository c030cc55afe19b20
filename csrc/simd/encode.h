// encode on one contiguous run of elements, 32 at a time: the votes of one ballot word.
#pragma once

#include <algorithm>
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

// Words whose zero votes wait for their coins: the loop that is hot knows none.
constexpr int64_t kWaitingWords = 512;

// What becomes of the zero votes of a binary ballot's words from `first` on: a word in which all
// votes are zero is blank; else they are coins.
inline void settle_zeros(const BallotRun& ballot, int64_t first, int64_t n, const uint32_t* zeros) {
  for (int64_t i = 0; i * kBitsPerWord < n; ++i) {
    if (zeros[i] == 0) continue;
    const int64_t w = first + i, rest = n - i * kBitsPerWord;
    if (zeros[i] == (rest < kBitsPerWord ? (1u << rest) - 1u : ~0u)) {
      ballot.blanks[w / 8] |= static_cast<uint8_t>(1u << (w % 8));
    } else {
      const uint32_t toss = coins(ballot.coin_key, ballot.first_word + w) ^ ballot.flip;
      ballot.plane0[w] |= zeros[i] & toss;
    }
  }
}

struct Seen {
  int64_t nonfinite = 0;
  uint32_t zeros = 0;  // of any word
};

// The votes of words as bits of those that are zero and of those that are +1. Once for both kinds
// of ballots: a call takes nothing beside thousands of elements, and a copy seconds of every build.
template <bool kCautious, class G, class M>
__attribute__((noinline)) Seen vote(const G* g_data, M* m_data, int64_t n, const Moments& moments,
                                    const LionScalars& scalars, uint32_t* zero_out,
                                    uint32_t* plus_out) {
  int64_t nonfinite = 0;
  uint32_t zeros = 0;
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
        zero_out[i] = valid & ~(plus | minus);
        zeros |= zero_out[i];
        plus_out[i] = plus;
      },
      g_data, m_data);
  return {nonfinite, zeros};
}

template <bool kCautious, class G, class M>
int64_t encode_row(const void* g_data, void* m_data, int64_t n, const LionScalars& scalars,
                   const BallotRun& ballot) {
  const Moments moments(scalars);
  const G* g = static_cast<const G*>(g_data);
  M* m = static_cast<M*>(m_data);
  if (ballot.plane1 != nullptr)
    return vote<kCautious>(g, m, n, moments, scalars, ballot.plane0, ballot.plane1).nonfinite;
  int64_t nonfinite = 0;
  uint32_t zeros[kWaitingWords];
  for (int64_t w = 0; w * kBitsPerWord < n; w += kWaitingWords) {
    const int64_t at = w * kBitsPerWord, count = std::min(n - at, kWaitingWords * kBitsPerWord);
    const Seen seen =
        vote<kCautious>(g + at, m + at, count, moments, scalars, zeros, ballot.plane0 + w);
    nonfinite += seen.nonfinite;
    if (seen.zeros != 0) settle_zeros(ballot, w, count, zeros);
  }
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
