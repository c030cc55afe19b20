// Fair coins that are hashes, not a generator with state: the same (seed, stream, step, element)
// gives the same coin on every rank, back end, exchange and after every resume.
//
// One hash tosses the 32 coins of one ballot word; element 32*w + k is bit k of word w's hash. The
// mixer is SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
#pragma once

#include <cstdint>

#include "bitplanes.h"

namespace lion {

// Every stream is the same on every rank: of ties, and of the random bits of stochastic rounding.
constexpr int64_t kTieStream = -1;
constexpr int64_t kRoundingStream = -2;

// Of zero votes, whose coins two steps share: every other step and every other rank takes them the
// other way round.
constexpr int64_t kZeroStream = -3;

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;

LION_HOST_DEVICE uint64_t mix64(uint64_t z) {
  z += kGamma;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

LION_HOST_DEVICE uint64_t coin_key(int64_t seed, int64_t stream, int64_t step) {
  return mix64(mix64(mix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(stream)) ^
               static_cast<uint64_t>(step));
}

// The 32 coins of word `word`.
LION_HOST_DEVICE uint32_t coins(uint64_t key, uint64_t word) {
  return static_cast<uint32_t>(mix64(key + word * kGamma) >> 32);
}

}  // namespace lion
