// tally and elect on a run of words, a tile at a time.
//
// Included inside the namespace of a SIMD level, after simd.h. `Block` is one vector register of
// bits. A tile's counters stay in the first-level cache while the ballots stream past, eight rows
// at a time: more rows at once than the prefetcher follows would halve the speed.

typedef uint32_t Block __attribute__((vector_size(kBlockBytes)));
constexpr int64_t kBlockWords = kBlockBytes / sizeof(uint32_t);
constexpr int64_t kTileWords = 256;
constexpr int64_t kTileBlocks = kTileWords / kBlockWords;

inline Block load_block(const uint32_t* words, int64_t count) {
  Block block{};
  std::memcpy(&block, words, static_cast<size_t>(count) * sizeof(uint32_t));
  return block;
}
inline void store_block(uint32_t* words, const Block& block, int64_t count) {
  std::memcpy(words, &block, static_cast<size_t>(count) * sizeof(uint32_t));
}

using Counter = Block[kMaxPlanes];

// Calls visit(block index, word offset, words) for each block of a tile of `words` words; a full
// tile tells the compiler every count.
template <bool kFullTile, class Visit>
inline void for_each_block(int64_t words, Visit visit) {
  if (kFullTile) {
    for (int64_t k = 0; k < kTileBlocks; ++k) visit(k, k * kBlockWords, kBlockWords);
  } else {
    for (int64_t k = 0; k * kBlockWords < words; ++k)
      visit(k, k * kBlockWords, std::min(kBlockWords, words - k * kBlockWords));
  }
}

// Sums the ballots of the `words` words from word w into the tile's counters.
template <bool kFullTile>
inline void count_tile(const TallyRows& rows, int64_t w, int64_t words,
                       Counter (&counters)[kTileBlocks]) {
  for_each_block<kFullTile>(words, [&](int64_t k, int64_t, int64_t) {
    for (int b = 0; b < rows.planes_out; ++b) counters[k][b] = Block{};
  });
  for (int64_t i = 0; i < rows.n_ballots; i += 8) {
    const int64_t n = std::min<int64_t>(8, rows.n_ballots - i);
    for (int b = 0; b < rows.planes_in; ++b) {
      const uint32_t* first = rows.ballots + i * rows.ballot_stride + b * rows.plane_stride + w;
      for_each_block<kFullTile>(words, [&](int64_t k, int64_t offset, int64_t count) {
        const uint32_t* row = first + offset;
        if (n == 8) {
          Block bits[8];
          for (int r = 0; r < 8; ++r) bits[r] = load_block(row + r * rows.ballot_stride, count);
          add_eight_bits(counters[k], rows.planes_out, b, bits);
        } else {
          for (int64_t r = 0; r < n; ++r)
            add_bit(counters[k], rows.planes_out, b,
                    load_block(row + r * rows.ballot_stride, count));
        }
      });
    }
  }
}

template <bool kFullTile>
inline void tally_tile(const TallyRows& rows, int64_t w, int64_t words) {
  Counter counters[kTileBlocks];
  count_tile<kFullTile>(rows, w, words, counters);
  for (int b = 0; b < rows.planes_out; ++b) {
    uint32_t* out = rows.out + b * rows.out_stride + w;
    for_each_block<kFullTile>(words, [&](int64_t k, int64_t offset, int64_t count) {
      store_block(out + offset, counters[k][b], count);
    });
  }
}

template <bool kFullTile>
inline void elect_tile(const TallyRows& rows, int64_t w, int64_t words) {
  Counter counters[kTileBlocks];
  count_tile<kFullTile>(rows, w, words, counters);
  uint32_t *low = rows.out + w, *high = low + rows.out_stride;
  for_each_block<kFullTile>(words, [&](int64_t k, int64_t offset, int64_t count) {
    Block won, tied;
    compare(counters[k], rows.planes_out, rows.scale / 2, won, tied);
    if (rows.scale % 2 != 0) {
      store_block(low + offset, won, count);
    } else if (rows.toss_ties) {
      Block toss{};
      const uint64_t word = rows.first_word + static_cast<uint64_t>(w + offset);
      for (int64_t j = 0; j < count; ++j) toss[j] = coins(rows.coin_key, word + j);
      store_block(low + offset, won | (tied & toss), count);
    } else {
      store_block(low + offset, tied, count);
      store_block(high + offset, won, count);
    }
  });
}

void tally_row(const TallyRows& rows, int64_t begin, int64_t end) {
  int64_t w = begin;
  for (; w + kTileWords <= end; w += kTileWords) tally_tile<true>(rows, w, kTileWords);
  if (w < end) tally_tile<false>(rows, w, end - w);
}

void elect_row(const TallyRows& rows, int64_t begin, int64_t end) {
  int64_t w = begin;
  for (; w + kTileWords <= end; w += kTileWords) elect_tile<true>(rows, w, kTileWords);
  if (w < end) elect_tile<false>(rows, w, end - w);
}
