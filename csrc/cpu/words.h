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

// Words a parallel task takes at the least: 32,768 elements.
constexpr int64_t kGrainWords = 1024;
constexpr int64_t kWordsPerBlock = kBlock / kBitsPerWord;

// Tensors laid end to end in word space: tensor t owns words [first[t], first[t + 1]).
struct WordSpace {
  std::vector<int64_t> first{0};
  void append(int64_t numel) { first.push_back(first.back() + words_of(numel)); }
  int64_t n_words() const { return first.back(); }
  size_t tensor_of(int64_t word) const {
    return std::upper_bound(first.begin(), first.end(), word) - first.begin() - 1;
  }

  // The first word at or behind `word` that starts a block of its tensor, or another tensor.
  int64_t block_at(int64_t word) const {
    if (word >= n_words()) return word;
    const size_t t = tensor_of(word);
    const int64_t blocks = (word - first[t] + kWordsPerBlock - 1) / kWordsPerBlock;
    return std::min(first[t] + blocks * kWordsPerBlock, first[t + 1]);
  }

  // Calls visit(t, begin, end) for each tensor that has words in [begin, end), in parallel runs
  // that no block lies across.
  template <class Visit>
  void for_each_run(const Visit& visit) const {
    parallel_for(n_words(), kGrainWords, [&](int64_t from, int64_t to) {
      int64_t begin = block_at(from);
      const int64_t end = block_at(to);
      if (begin >= end) return;
      for (size_t t = tensor_of(begin); begin < end; ++t) {
        const int64_t stop = std::min(end, first[t + 1]);
        if (stop > begin) visit(t, begin, stop);
        begin = std::max(begin, stop);
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

// Calls visit(shard, word in shard, begin, end) for the pieces of [begin, end) in each shard.
template <class Visit>
void split_by_shard(int64_t words_per_shard, int64_t begin, int64_t end, const Visit& visit) {
  while (begin < end) {
    const int64_t shard = begin / words_per_shard;
    const int64_t stop = std::min(end, (shard + 1) * words_per_shard);
    visit(shard, begin - shard * words_per_shard, begin, stop);
    begin = stop;
  }
}

}  // namespace lion
