// Word space: tensors laid end to end, each from a word of its own on, cut into runs for the
// threads and pieces for the shards. Knows sizes, no tensors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bitplanes.h"
#include "simd/interface.h"
#include "stable/parallel.h"

namespace lion {

inline int64_t words_of(int64_t numel) { return (numel + kBitsPerWord - 1) / kBitsPerWord; }

// Words whose blank bits are one byte. Tensors and shards are whole octets, and what a thread takes
// is; so it holds whole blocks of int8 momenta too.
constexpr int64_t kOctet = 8;
static_assert(kOctet * kBitsPerWord % kBlock == 0);
inline int64_t octets_of(int64_t n_words) { return (n_words + kOctet - 1) / kOctet; }
inline int64_t room_of(int64_t numel) { return octets_of(words_of(numel)) * kOctet; }

// At the end of a trailer: status, version, and a digest of two words.
constexpr int64_t kSealWords = 4;

// Words a parallel task takes at the least: 32,768 elements.
constexpr int64_t kGrainWords = 1024;

// Tensors laid end to end in word space: tensor t owns words [first[t], first[t + 1]).
struct WordSpace {
  std::vector<int64_t> first;
  explicit WordSpace(int64_t first_word) : first{first_word} {}
  void append(int64_t numel) { first.push_back(first.back() + room_of(numel)); }
  int64_t end() const { return first.back(); }
  size_t tensor_of(int64_t word) const {
    return std::upper_bound(first.begin(), first.end(), word) - first.begin() - 1;
  }

  // Calls visit(t, begin, end) for each tensor that has words in [begin, end), in parallel runs of
  // whole octets.
  template <class Visit>
  void for_each_run(const Visit& visit) const {
    const int64_t n_octets = (end() - first[0]) / kOctet;
    parallel_for(n_octets, kGrainWords / kOctet, [&](int64_t from, int64_t to) {
      int64_t begin = first[0] + from * kOctet;
      const int64_t stop = first[0] + to * kOctet;
      if (begin >= stop) return;
      for (size_t t = tensor_of(begin); begin < stop; ++t) {
        const int64_t last = std::min(stop, first[t + 1]);
        if (last > begin) visit(t, begin, last);
        begin = std::max(begin, last);
      }
    });
  }
};

struct Segment {
  int64_t offset, count;  // elements of the tensor
};
inline Segment segment_of(const WordSpace& space, size_t t, int64_t begin, int64_t end,
                          int64_t numel) {
  const int64_t offset = (begin - space.first[t]) * kBitsPerWord;
  return {offset, std::min(numel - offset, (end - begin) * kBitsPerWord)};
}

}  // namespace lion
