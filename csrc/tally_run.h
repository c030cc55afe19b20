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
  bool toss_ties;       // elect only: one plane
  uint64_t coin_key;    // of ties, and of halves that blank words leave
  uint64_t first_word;  // position of word 0 in word space
  // A bit a word: word w has bit w % 8 of byte w / 8. Null: no word of any ballot is blank.
  const uint8_t* blanks;
  int64_t blank_stride;  // bytes, from ballot to ballot
  // Of words that all ballots leave blank, whose planes are 0 then. Null where `out` can say zero:
  // such words are at its middle.
  uint8_t* out_blanks;
  int64_t out_blank_bytes;  // those behind the last word are padding, and become 0
  const int32_t* weights;   // as how many ballots each counts; null: as one
};

}  // namespace lion
