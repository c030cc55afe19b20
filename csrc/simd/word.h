// The elements of one ballot word, 32 at once, as every kernel but the tally walks a run.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "bitplanes.h"
#include "simd/target.h"
#include "simd/vec.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

constexpr int kVecs = kBitsPerWord / Vec::kLanes;  // vectors a ballot word
constexpr uint32_t kAllLanes = static_cast<uint32_t>((1ull << Vec::kLanes) - 1);

// Stores one word's elements. The bf16 form of a level that can round two vectors together is in
// vec.h.
template <class T>
LION_INLINE void store_word(T* x, const Vec (&a)[kVecs]) {
  for (int j = 0; j < kVecs; ++j) store(x + j * Vec::kLanes, a[j]);
}

template <class T>
LION_INLINE void copy_back(const T* edge, T* data, size_t count) {
  std::memcpy(data, edge, count * sizeof(T));
}
template <class T>
LION_INLINE void copy_back(const T*, const T*, size_t) {}

// Runs `word(offset, pointers...)` for every 32 elements; the last, partial word goes through
// zero-padded copies, so that the vector code never sees an edge. `valid` has a bit an element.
template <class Word, class... T>
LION_INLINE void for_each_word(int64_t n, Word word, T*... data) {
  const int64_t full = n / kBitsPerWord;
  for (int64_t i = 0; i < full; ++i) word(i, ~0u, (data + i * kBitsPerWord)...);
  const int64_t rest = n - full * kBitsPerWord;
  if (rest == 0) return;
  const uint32_t valid = (1u << rest) - 1u;
  std::tuple<std::array<std::remove_const_t<T>, kBitsPerWord>...> padded{};
  std::apply(
      [&](auto&... edge) {
        const size_t count = static_cast<size_t>(rest);
        (std::memcpy(edge.data(), data + full * kBitsPerWord, count * sizeof(T)), ...);
        word(full, valid, edge.data()...);
        (copy_back(edge.data(), data + full * kBitsPerWord, count), ...);
      },
      padded);
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
