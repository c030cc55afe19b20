// Lists of tensors as the CPU ops walk them: laid end to end in word space, cut into runs for the
// threads, pieces for the shards, and chunks for int8 momenta. No arithmetic here.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.h"

namespace lion {

constexpr int64_t kWordsPerBlock = kBlock / kBitsPerWord;
// Elements of an int8 momentum that are float32 at a time: 2 KiB.
constexpr int64_t kChunk = 4 * kBlock;

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
  void for_each_run(Visit visit) const {
    at::parallel_for(0, n_words(), kGrainWords, [&](int64_t from, int64_t to) {
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

template <class T>
T* advance(T* data, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes));
}

// Calls visit(shard, word in shard, begin, end) for the pieces of [begin, end) in each shard.
template <class Visit>
void split_by_shard(int64_t words_per_shard, int64_t begin, int64_t end, Visit visit) {
  while (begin < end) {
    const int64_t shard = begin / words_per_shard;
    const int64_t stop = std::min(end, (shard + 1) * words_per_shard);
    visit(shard, begin - shard * words_per_shard, begin, stop);
    begin = stop;
  }
}

struct Item {
  void* data;
  const void* grad;
  void* exp_avg;
  int64_t numel, data_size, exp_avg_size;  // sizes: bytes an element
  DType dtype, exp_avg_dtype;
  void* low;      // of as many bytes an element as the parameter; itself where nothing is kept
  float* scales;  // of an int8 momentum
};

// Calls visit(segment, momentum, its dtype) for the elements of a run. An int8 momentum becomes
// float32 for the length of a chunk, which stays in the nearest cache.
template <bool kWrite = true, class Visit>
void for_each_chunk(const RowKernels& kernels, const Item& item, const Segment& run, Visit visit) {
  if (item.exp_avg_dtype != kInt8)
    return visit(run, advance(item.exp_avg, run.offset * item.exp_avg_size), item.exp_avg_dtype);
  alignas(64) float m[kChunk];
  for (int64_t done = 0; done < run.count; done += kChunk) {
    const Segment chunk{run.offset + done, std::min(kChunk, run.count - done)};
    int8_t* q = static_cast<int8_t*>(item.exp_avg) + chunk.offset;
    float* scales = item.scales + chunk.offset / kBlock;
    kernels.dequantize(q, scales, chunk.count, m);
    visit(chunk, static_cast<void*>(m), kFloat32);
    if (kWrite) kernels.quantize(m, chunk.count, q, scales);
  }
}

}  // namespace lion
