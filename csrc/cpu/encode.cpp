// encode over lists of CPU tensors: one parallel region a call, then flags and padding.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bitplanes.h"
#include "coin.h"
#include "cpu/checks.h"
#include "cpu/lists.h"
#include "cpu/ops.h"
#include "cpu/scalars.h"
#include "cpu/words.h"
#include "planes.h"
#include "simd/levels.h"
#include "stable/errors.h"

namespace lion {
namespace {

// The ballot of a tensor without a gradient on this rank: zero votes.
void abstain(int64_t count, const BallotRun& run) {
  for (int64_t i = 0; i * kBitsPerWord < count; ++i) {
    const int64_t rest = count - i * kBitsPerWord;
    const uint32_t valid = rest >= kBitsPerWord ? ~0u : (1u << rest) - 1u;
    if (run.plane1 != nullptr) {
      run.plane0[i] = valid;
      run.plane1[i] = 0;
    } else {
      run.plane0[i] = valid & coins(run.coin_key, run.first_word + static_cast<uint64_t>(i));
    }
  }
}

}  // namespace

void cpu::encode(const MaybeTensors& grads, const Tensors& exp_avgs, const Tensor& ballot,
                 const Tensor& flags, double beta1, double beta2, bool maximize, int64_t seed,
                 int64_t rank, const Tensor& step, const Tensor& nonfinite,
                 const OptionalTensor& grad_scale, const OptionalTensor& found_inf, bool cautious,
                 const OptionalTensors& block_scales) {
  LION_CHECK(grads.size() == exp_avgs.size(), "grads and exp_avgs must have equal lengths, got ",
             grads.size(), " and ", exp_avgs.size());
  check_planes(ballot, "ballot", 3);
  LION_CHECK(ballot.size(1) == 1 || ballot.size(1) == 2,
             "ballot must have 1 plane (binary) or 2 (ternary), got ", ballot.size(1));
  Lists lists(exp_avgs.size(), &block_scales);
  std::vector<uint32_t> present(static_cast<size_t>(words_of(exp_avgs.size())), 0u);
  for (size_t i = 0; i < exp_avgs.size(); ++i) {
    const OptionalTensor& g = grads[i];
    const Tensor& m = exp_avgs[i];
    lists.append({nullptr, g.has_value() ? &*g : nullptr, &m}, m);
    if (g.has_value()) present[i / kBitsPerWord] |= 1u << (i % kBitsPerWord);
  }
  check_room(lists.n_words(), ballot, "ballot");
  check_planes(flags, "flags", 2);
  LION_CHECK(flags.size(0) == ballot.size(0), "flags must have a row for each of ", ballot.size(0),
             " shards, got ", flags.size(0));
  check_flags(flags, "flags", exp_avgs.size());

  const bool ternary = ballot.size(1) == 2;
  const uint64_t key = coin_key(seed, rank, count_of(step, "step"));
  count_of(nonfinite, "nonfinite");
  const LionScalars scalars = scalars_of(beta1, beta2, 0.0, 0.0, maximize, grad_scale);
  if (is_set(found_inf)) return;
  auto* words = reinterpret_cast<uint32_t*>(ballot.data_ptr<int32_t>());
  const int64_t words_per_shard = ballot.size(2);
  const int64_t shard_stride = ballot.stride(0), plane_stride = ballot.stride(1);
  const SimdLevel& kernels = simd_level();
  std::atomic<int64_t> skipped{0};
  const auto& encodes = kernels.encode[cautious];
  // Calls visit(segment, where its ballot goes) for the pieces of a segment in each shard.
  const auto for_each_piece = [&](size_t t, const Segment& run, const auto& visit) {
    lists.for_each_piece(words_per_shard, t, run,
                         [&](int64_t shard, int64_t word, int64_t first_word, const Segment& s) {
                           uint32_t* plane0 = words + shard * shard_stride + word;
                           visit(s, BallotRun{plane0, ternary ? plane0 + plane_stride : nullptr,
                                              key, static_cast<uint64_t>(first_word)});
                         });
  };
  lists.for_each_run([&](size_t t, const Segment& whole) {
    const Item& item = lists[t];
    if (item.grad == nullptr)
      return for_each_piece(t, whole,
                            [](const Segment& s, const BallotRun& run) { abstain(s.count, run); });
    for_each_chunk(kernels, item, whole, [&](const Segment& chunk, void* m, DType m_dtype) {
      const int64_t m_size = m_dtype == kFloat32 ? sizeof(float) : item.exp_avg_size;
      for_each_piece(t, chunk, [&](const Segment& s, const BallotRun& run) {
        const int64_t n = encodes[item.dtype][m_dtype](
            advance(item.grad, s.offset * item.data_size),
            advance(m, (s.offset - chunk.offset) * m_size), s.count, scalars, run);
        if (n != 0) skipped += n;
      });
    });
  });
  // Words behind the last tensor: the buffer may hold anything.
  split_by_shard(words_per_shard, lists.n_words(), ballot.size(0) * words_per_shard,
                 [&](int64_t shard, int64_t word, int64_t begin, int64_t end) {
                   for (int64_t b = 0; b < ballot.size(1); ++b)
                     std::fill_n(words + shard * shard_stride + b * plane_stride + word,
                                 end - begin, 0u);
                 });
  present.resize(static_cast<size_t>(flags.size(1)), 0u);
  for (int64_t shard = 0; shard < flags.size(0); ++shard)
    std::memcpy(flags.data_ptr<int32_t>() + shard * flags.stride(0), present.data(),
                present.size() * sizeof(uint32_t));
  if (skipped != 0) count_up(nonfinite, skipped);
}

}  // namespace lion
