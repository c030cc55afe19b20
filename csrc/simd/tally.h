// tally and elect on a run of words, a tile at a time.
//
// `Block` is one vector register of bits. A few rows are streamed one block at a time, with the
// counters in registers. Of more rows than the hardware's prefetcher follows, eight at a time
// stream past a tile of counters, which stay in the first-level cache, while the next eight are
// fetched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bitplanes.h"
#include "coin.h"
#include "simd/target.h"
#include "simd/vec.h"
#include "tally_rows.h"

LION_SIMD_BEGIN
namespace lion::LION_SIMD_LEVEL {

typedef uint32_t Block __attribute__((vector_size(kBlockBytes)));
constexpr int64_t kBlockWords = kBlockBytes / sizeof(uint32_t);
constexpr int64_t kMaxStreams = 16;   // rows that are read side by side
constexpr int64_t kTileWords = 1024;  // one page of each row
constexpr int kTileBlocks = kTileWords / kBlockWords;

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
inline void count_blocks(const TallyRows& rows, int64_t w, int64_t count,
                         Block (&counters)[kBlocks][kPlanes]) {
  for (auto& counter : counters)
    for (Block& plane : counter) plane = Block{};
  for (int64_t i = 0; i < rows.n_ballots; i += 8) {
    const int64_t n = std::min<int64_t>(8, rows.n_ballots - i);
    const int64_t next = i + 8 < rows.n_ballots ? 8 * rows.ballot_stride
                                                : kBlocks * kBlockWords - i * rows.ballot_stride;
#pragma GCC unroll 16
    for (int b = 0; b < kPlanes; ++b) {
      if (b == rows.planes_in) break;
      const uint32_t* row = rows.ballots + i * rows.ballot_stride + b * rows.plane_stride + w;
      for (int k = 0; k < kBlocks; ++k, row += kBlockWords) {
        if (n == 8) {
          Block bits[8];
          for (int r = 0; r < 8; ++r) {
            if (kBlocks > 1) __builtin_prefetch(row + r * rows.ballot_stride + next);
            bits[r] = load_block(row + r * rows.ballot_stride, count);
          }
          add_eight_bits(counters[k], kPlanes, b, bits);
        } else {
          for (int64_t r = 0; r < n; ++r)
            add_bit(counters[k], kPlanes, b, load_block(row + r * rows.ballot_stride, count));
        }
      }
    }
  }
}

struct Tally {
  template <int kPlanes, int kBlocks>
  static void run(const TallyRows& rows, int64_t w, int64_t count) {
    Block counters[kBlocks][kPlanes];
    count_blocks(rows, w, count, counters);
    for (int b = 0; b < std::min(kPlanes, rows.planes_out); ++b) {
      uint32_t* out = rows.out + b * rows.out_stride + w;
      for (int k = 0; k < kBlocks; ++k) store_block(out + k * kBlockWords, counters[k][b], count);
    }
  }
};

struct Elect {
  template <int kPlanes, int kBlocks>
  static void run(const TallyRows& rows, int64_t w, int64_t count) {
    Block counters[kBlocks][kPlanes];
    count_blocks(rows, w, count, counters);
    for (int k = 0; k < kBlocks; ++k, w += kBlockWords) {
      uint32_t *low = rows.out + w, *high = low + rows.out_stride;
      Block won, tied;
      compare(counters[k], kPlanes, rows.scale / 2, won, tied);
      if (rows.scale % 2 != 0) {
        store_block(low, won, count);
      } else if (rows.toss_ties) {
        Block toss{};
        const uint64_t word = rows.first_word + static_cast<uint64_t>(w);
        for (int64_t j = 0; j < count; ++j) toss[j] = coins(rows.coin_key, word + j);
        store_block(low, won | (tied & toss), count);
      } else {
        store_block(low, tied, count);
        store_block(high, won, count);
      }
    }
  }
};

template <class Op, int kPlanes>
void for_each_tile(const TallyRows& rows, int64_t w, int64_t end) {
  if (rows.n_ballots * rows.planes_in > kMaxStreams)
    for (; w + kTileWords <= end; w += kTileWords)
      Op::template run<kPlanes, kTileBlocks>(rows, w, kBlockWords);
  for (; w + kBlockWords <= end; w += kBlockWords)
    Op::template run<kPlanes, 1>(rows, w, kBlockWords);
  if (w < end) Op::template run<kPlanes, 1>(rows, w, end - w);
}

// Scales below 4, 16 and 128: 2 or 3 ranks, up to 15, up to 127; planes beyond need not exist.
template <class Op>
void count_row(const TallyRows& rows, int64_t begin, int64_t end) {
  if (rows.planes_out <= 2) return for_each_tile<Op, 2>(rows, begin, end);
  if (rows.planes_out <= 4) return for_each_tile<Op, 4>(rows, begin, end);
  if (rows.planes_out <= 7) return for_each_tile<Op, 7>(rows, begin, end);
  for_each_tile<Op, kMaxPlanes>(rows, begin, end);
}

}  // namespace lion::LION_SIMD_LEVEL
LION_SIMD_END
