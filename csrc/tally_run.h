// What tally and elect work on, for every back end: plain pointers, no tensors.
#pragma once

#include <cstdint>

namespace lion {

struct TallyRun {
  const uint32_t* ballots;
  int64_t ballot_stride, plane_stride;  // words
  int64_t n_ballots;
  int planes_in, planes_out;
  uint32_t scale;  // of the sum
  uint32_t* out;
  int64_t out_stride;   // words
  bool toss_ties;       // elect only: one plane, even scale
  uint64_t coin_key;    // elect only
  uint64_t first_word;  // elect only: position of word 0 in the whole ballot
};

}  // namespace lion
