// tally and elect on a run of words, a strip at a time.
//
// `Block` is one vector register of bits. A few ballots are streamed one block at a time, with the
// counters in registers. Of more ballots than the hardware's prefetcher follows, eight at a time
// stream past a strip of counters, which stay in the first-level cache, while the next eight are
// fetched. A strip where a ballot has a blank word, and every strip where ballots have weights, is
// counted one ballot after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// The coins of `count` words from word w on.
inline Block coins_of(const TallyRun& run, int64_t w, int64_t count) {
  Block toss{};
  const uint64_t word = run.first_word + static_cast<uint64_t>(w);
  for (int64_t j = 0; j < count; ++j) toss[j] = coins(run.coin_key, word + j);
  return toss;
}

// What becomes of counted blocks. `odd`: all ones in words where blank ballots leave a half.
struct Tally {
  template <int kPlanes>
  static void write(const TallyRun& run, int64_t w, int64_t count, Block (&counter)[kPlanes],
                    const Block& odd, bool any_blank) {
    if (any_blank) add_bit(counter, kPlanes, 0, odd & coins_of(run, w, count));
    for (int b = 0; b < std::min(kPlanes, run.planes_out); ++b)
      store_block(run.out + b * run.out_stride + w, counter[b], count);
  }
};

struct Elect {
  template <int kPlanes>
  static void write(const TallyRun& run, int64_t w, int64_t count, Block (&counter)[kPlanes],
                    const Block& odd, bool any_blank) {
    uint32_t *low = run.out + w, *high = low + run.out_stride;
    Block won, tied;
    compare_with_half(counter, kPlanes, run.scale, odd, won, tied);
    if (!run.toss_ties) {
      store_block(low, tied, count);
      store_block(high, won, count);
    } else if (run.scale % 2 != 0 && !any_blank) {
      store_block(low, won, count);
    } else {
      store_block(low, won | (tied & coins_of(run, w, count)), count);
    }
  }
};

template <class Op, int kPlanes, int kBlocks>
inline void count_plain(const TallyRun& run, int64_t w, int64_t count) {
  Block counters[kBlocks][kPlanes];
  count_blocks(run, w, count, counters);
  for (int k = 0; k < kBlocks; ++k)
    Op::template write<kPlanes>(run, w + k * kBlockWords, count, counters[k], Block{}, false);
}

// Whether any ballot has a blank word among words [begin, end), eight bytes at a time.
inline bool has_blank(const TallyRun& run, int64_t begin, int64_t end) {
  if (run.blanks == nullptr) return false;
  const int64_t n = (end + 7) / 8 - begin / 8;
  uint64_t any = 0;
  for (int64_t i = 0; i < run.n_ballots; ++i) {
    const uint8_t* blanks = run.blanks + i * run.blank_stride + begin / 8;
    int64_t o = 0;
    for (uint64_t eight; o + 8 <= n; o += 8) {
      std::memcpy(&eight, blanks + o, sizeof eight);
      any |= eight;
    }
    for (; o < n; ++o) any |= blanks[o];
  }
  return any != 0;
}

// All ones in the blank words of a block; `words` holds a bit for each.
inline Block spread(uint32_t words) {
  Block block;
  for (int64_t j = 0; j < kBlockWords; ++j) block[j] = 0u - ((words >> j) & 1u);
  return block;
}

// The blank bits of the `count` words of a block.
inline uint32_t blanks_at(const uint8_t* blanks, int64_t w, int64_t count) {
  uint32_t words = 0;
  std::memcpy(&words, blanks + w / 8, static_cast<size_t>((w % 8 + count + 7) / 8));
  return (words >> (w % 8)) & ((1u << count) - 1u);
}

// Words [begin, end), whole octets but at the end, with blank words and weights.
template <class Op, int kPlanes>
void count_exactly(const TallyRun& run, int64_t begin, int64_t end, bool any_blank) {
  for (int64_t w = begin; w < end; w += kBlockWords) {
    const int64_t count = std::min(kBlockWords, end - w);
    Block counter[kPlanes]{}, odd{};
    for (int64_t i = 0; i < run.n_ballots; ++i) {
      Block blank{};
      if (any_blank) blank = spread(blanks_at(run.blanks + i * run.blank_stride, w, count));
      const uint32_t weight = run.weights == nullptr ? 1u : static_cast<uint32_t>(run.weights[i]);
      for (int b = 0; b < run.planes_in; ++b) {
        const uint32_t* plane = run.ballots + i * run.ballot_stride + b * run.plane_stride + w;
        add_weighted(counter, kPlanes, b, weight, blank, odd, load_block(plane, count));
      }
    }
    if (run.out_blanks != nullptr && any_blank) {
      uint32_t all = ~0u;
      for (int64_t i = 0; i < run.n_ballots; ++i)
        all &= blanks_at(run.blanks + i * run.blank_stride, w, count);
      Op::template write<kPlanes>(run, w, count, counter, odd, any_blank);
      if (all != 0) {
        const Block keep = ~spread(all);
        const int planes = std::is_same_v<Op, Tally> ? run.planes_out : 1;
        for (int b = 0; b < planes; ++b) {
          uint32_t* out = run.out + b * run.out_stride + w;
          store_block(out, load_block(out, count) & keep, count);
        }
      }
    } else {
      Op::template write<kPlanes>(run, w, count, counter, odd, any_blank);
    }
  }
}

// The words that all leave blank, of whole octets.
inline void write_blanks(const TallyRun& run, int64_t begin, int64_t end, bool any_blank) {
  for (int64_t o = begin / 8; o < (end + 7) / 8; ++o) {
    uint8_t all = any_blank ? 0xFF : 0;
    for (int64_t i = 0; i < (any_blank ? run.n_ballots : 0); ++i)
      all &= run.blanks[i * run.blank_stride + o];
    const int64_t rest = end - o * 8;
    if (rest < 8) all &= static_cast<uint8_t>((1 << rest) - 1);
    run.out_blanks[o] = all;
  }
}

// Words [begin, end), without blank words and weights.
template <class Op, int kPlanes>
void count_all(const TallyRun& run, int64_t w, int64_t end) {
  if (run.n_ballots * run.planes_in > kMaxStreams)
    for (; w + kStripWords <= end; w += kStripWords)
      count_plain<Op, kPlanes, kStripBlocks>(run, w, kBlockWords);
  for (; w + kBlockWords <= end; w += kBlockWords) count_plain<Op, kPlanes, 1>(run, w, kBlockWords);
  if (w < end) count_plain<Op, kPlanes, 1>(run, w, end - w);
}

template <class Op, int kPlanes>
void for_each_strip(const TallyRun& run, int64_t begin, int64_t end) {
  // Models without blank words are asked once.
  if (run.weights == nullptr && !has_blank(run, begin, end)) {
    count_all<Op, kPlanes>(run, begin, end);
    if (run.out_blanks != nullptr)
      std::memset(run.out_blanks + begin / 8, 0, static_cast<size_t>((end + 7) / 8 - begin / 8));
    return;
  }
  for (int64_t w = begin; w < end; w += kStripWords) {
    const int64_t stop = std::min(end, w + kStripWords);
    const bool any_blank = has_blank(run, w, stop);
    if (any_blank || run.weights != nullptr)
      count_exactly<Op, kPlanes>(run, w, stop, any_blank);
    else
      count_all<Op, kPlanes>(run, w, stop);
    if (run.out_blanks != nullptr) write_blanks(run, w, stop, any_blank);
  }
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
