// The lists of a call, as the CPU ops walk them: one item an index, checked once, in word space.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/scalars.h"
#include "cpu/words.h"
#include "simd/interface.h"
#include "stable/boxed.h"

namespace lion {

// What the lists hold at one index. Null: the op has no such list, or there is no gradient.
struct Entry {
  const Tensor *param, *grad, *exp_avg;
};

// An entry as the kernels take it.
struct Item {
  void* data;
  const void* grad;
  void* exp_avg;
  int64_t numel, data_size, exp_avg_size;  // sizes: bytes an element
  DType dtype, exp_avg_dtype;
  void* low;  // of as many bytes an element as the parameter; itself where nothing is kept
  float* block_scales;  // of an int8 momentum
};

// A tensor of a list of optional ones; raises ValueError where it is missing.
const Tensor& present_in(const MaybeTensors& tensors, const char* name, size_t i);

class Lists {
 public:
  // block_scales: of int8 momenta; lows: what the parameters dropped, compensated rounding only.
  // Null where the op has no such list.
  Lists(size_t n_items, const OptionalTensors* block_scales, Rounding rounding = kNearest,
        const OptionalTensors* lows = nullptr, int64_t first_word = 0);

  // Lays the entry behind the others. Raises ValueError unless all of it lies on the device and in
  // the memory layout of `like`, which is one of its tensors.
  Item& append(const Entry& entry, const Tensor& like);

  size_t size() const { return items_.size(); }
  // The word behind the last.
  int64_t end_word() const { return space_.end(); }
  const Item& operator[](size_t t) const { return items_[t]; }
  // The word of element `offset` of item t.
  int64_t word_of(size_t t, int64_t offset) const {
    return space_.first[t] + offset / kBitsPerWord;
  }

  // Calls visit(t, segment) in parallel, for segments that make up all elements of all items.
  template <class Visit>
  void for_each_run(const Visit& visit) const {
    space_.for_each_run([&](size_t t, int64_t begin, int64_t end) {
      visit(t, segment_of(space_, t, begin, end, items_[t].numel));
    });
  }

  // Calls visit(shard, word in shard, word, segment) for the pieces of a segment in each shard.
  template <class Visit>
  void for_each_piece(int64_t words_per_shard, size_t t, Segment rest, const Visit& visit) const {
    for (int64_t word = word_of(t, rest.offset); rest.count > 0;) {
      const int64_t shard = word / words_per_shard, in_shard = word - shard * words_per_shard;
      const int64_t room = (words_per_shard - in_shard) * kBitsPerWord;
      const Segment piece{rest.offset, std::min(rest.count, room)};
      visit(shard, in_shard, word, piece);
      rest = {rest.offset + piece.count, rest.count - piece.count};
      word += words_of(piece.count);
    }
  }

 private:
  const OptionalTensors *scales_, *lows_;
  Rounding rounding_;
  size_t n_items_;
  std::vector<Item> items_;
  WordSpace space_;
};

// Elements of an int8 momentum that are float32 at a time: 2 KiB, two octets.
constexpr int64_t kChunk = 4 * kBlock;

template <class T>
T* advance(T* data, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes));
}

// Calls visit(segment, momentum, its dtype) for the elements of a run. An int8 momentum becomes
// float32 for the length of a chunk, which stays in the nearest cache.
template <bool kWrite = true, class Visit>
void for_each_chunk(const SimdLevel& kernels, const Item& item, const Segment& run, Visit visit) {
  if (item.exp_avg_dtype != kInt8)
    return visit(run, advance(item.exp_avg, run.offset * item.exp_avg_size), item.exp_avg_dtype);
  alignas(64) float m[kChunk];
  for (int64_t done = 0; done < run.count; done += kChunk) {
    const Segment chunk{run.offset + done, std::min(kChunk, run.count - done)};
    int8_t* q = static_cast<int8_t*>(item.exp_avg) + chunk.offset;
    float* block_scales = item.block_scales + chunk.offset / kBlock;
    kernels.dequantize(q, block_scales, chunk.count, m);
    visit(chunk, static_cast<void*>(m), kFloat32);
    if (kWrite) kernels.quantize(m, chunk.count, q, block_scales);
  }
}

}  // namespace lion
