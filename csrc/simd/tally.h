// tally and elect on a run of words, a strip at a time.
//
// `Block` is one vector register of bits. A few ballots are streamed one block at a time, with the
// counters in registers. Of more ballots than the hardware's prefetcher follows, eight at a time
// stream past a strip of counters, which stay in the first-level cache, while the next eight are
// fetched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bitplanes.h"
#include "coin.h"
#include "simd/target.h"
#include "simd/vec.h"
#include "tally_run.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

typedef uint32_t Block __attribute__((vector_size(kBlockBytes)));
constexpr int64_t kBlockWords = kBlockBytes / sizeof(uint32_t);
constexpr int64_t kMaxStreams = 16;    // planes of ballots that are read side by side
constexpr int64_t kStripWords = 1024;  // one page of each plane
constexpr int kStripBlocks = kStripWords / kBlockWords;

inline Block load_block(const uint32_t* words, int64_t count) {
  Block block{};
  std::memcpy(&block, words, static_cast<size_t>(count) * sizeof(uint32_t));
  return block;
}
inline void store_block(uint32_t* words, const Block& block, int64_t count) {
  std::memcpy(words, &block, static_cast<size_t>(count) * sizeof(uint32_t));
}

// Sums kBlocks blocks of all ballots from word w on; `count` words of a block are there. kPlanes,
// planes_out or more, is known to the compiler so that counters can be registers.
template <int kPlanes, int kBlocks>
inline void count_blocks(const TallyRun& run, int64_t w, int64_t count,
                         Block (&counters)[kBlocks][kPlanes]) {
  for (auto& counter : counters)
    for (Block& plane : counter) plane = Block{};
  for (int64_t i = 0; i < run.n_ballots; i += 8) {
    const int64_t n = std::min<int64_t>(8, run.n_ballots - i);
    const int64_t next = i + 8 < run.n_ballots ? 8 * run.ballot_stride
                                               : kBlocks * kBlockWords - i * run.ballot_stride;
#pragma GCC unroll 16
    for (int b = 0; b < kPlanes; ++b) {
      if (b == run.planes_in) break;
      const uint32_t* plane = run.ballots + i * run.ballot_stride + b * run.plane_stride + w;
      for (int k = 0; k < kBlocks; ++k, plane += kBlockWords) {
        if (n == 8) {
          Block bits[8];
          for (int r = 0; r < 8; ++r) {
            if (kBlocks > 1) __builtin_prefetch(plane + r * run.ballot_stride + next);
            bits[r] = load_block(plane + r * run.ballot_stride, count);
          }
          add_eight_bits(counters[k], kPlanes, b, bits);
        } else {
          for (int64_t r = 0; r < n; ++r)
            add_bit(counters[k], kPlanes, b, load_block(plane + r * run.ballot_stride, count));
        }
      }
    }
  }
}

struct Tally {
  template <int kPlanes, int kBlocks>
  static void at(const TallyRun& run, int64_t w, int64_t count) {
    Block counters[kBlocks][kPlanes];
    count_blocks(run, w, count, counters);
    for (int b = 0; b < std::min(kPlanes, run.planes_out); ++b) {
      uint32_t* out = run.out + b * run.out_stride + w;
      for (int k = 0; k < kBlocks; ++k) store_block(out + k * kBlockWords, counters[k][b], count);
    }
  }
};

struct Elect {
  template <int kPlanes, int kBlocks>
  static void at(const TallyRun& run, int64_t w, int64_t count) {
    Block counters[kBlocks][kPlanes];
    count_blocks(run, w, count, counters);
    for (int k = 0; k < kBlocks; ++k, w += kBlockWords) {
      uint32_t *low = run.out + w, *high = low + run.out_stride;
      Block won, tied;
      compare(counters[k], kPlanes, run.scale / 2, won, tied);
      if (run.scale % 2 != 0) {
        store_block(low, won, count);
      } else if (run.toss_ties) {
        Block toss{};
        const uint64_t word = run.first_word + static_cast<uint64_t>(w);
        for (int64_t j = 0; j < count; ++j) toss[j] = coins(run.coin_key, word + j);
        store_block(low, won | (tied & toss), count);
      } else {
        store_block(low, tied, count);
        store_block(high, won, count);
      }
    }
  }
};

template <class Op, int kPlanes>
void for_each_strip(const TallyRun& run, int64_t w, int64_t end) {
  if (run.n_ballots * run.planes_in > kMaxStreams)
    for (; w + kStripWords <= end; w += kStripWords)
      Op::template at<kPlanes, kStripBlocks>(run, w, kBlockWords);
  for (; w + kBlockWords <= end; w += kBlockWords) Op::template at<kPlanes, 1>(run, w, kBlockWords);
  if (w < end) Op::template at<kPlanes, 1>(run, w, end - w);
}

// Scales below 4, 16 and 128: 2 or 3 ranks, up to 15, up to 127; planes beyond need not exist.
template <class Op>
void count_run(const TallyRun& run, int64_t begin, int64_t end) {
  if (run.planes_out <= 2) return for_each_strip<Op, 2>(run, begin, end);
  if (run.planes_out <= 4) return for_each_strip<Op, 4>(run, begin, end);
  if (run.planes_out <= 7) return for_each_strip<Op, 7>(run, begin, end);
  for_each_strip<Op, kMaxPlanes>(run, begin, end);
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
