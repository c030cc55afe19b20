// encode over lists of CPU tensors: the trailers, then one parallel region.
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
    if (run.plane1 != nullptr) {
      run.plane0[i] = rest >= kBitsPerWord ? ~0u : (1u << rest) - 1u;
      run.plane1[i] = 0;
    } else {
      run.plane0[i] = 0;
      run.blanks[i / kOctet] |= static_cast<uint8_t>(1u << (i % kOctet));
    }
  }
}

// Words of the last octet, behind the tensor's end.
void pad(int64_t count, const BallotRun& run) {
  const int64_t begin = words_of(count), n = octets_of(begin) * kOctet - begin;
  std::fill_n(run.plane0 + begin, n, 0u);
  if (run.plane1 != nullptr) std::fill_n(run.plane1 + begin, n, 0u);
}

// Every row becomes the trailer, whose digest (the last two words) takes up what is shared.
void write_trailers(const OptionalTensor& trailers, const OptionalTensor& trailer,
                    const OptionalTensor& shared, int64_t shards) {
  LION_CHECK(
      trailers.has_value() == trailer.has_value() && trailers.has_value() == shared.has_value(),
      "trailers, trailer and shared must be given together");
  if (!trailers.has_value()) return;
  check_planes(*trailers, "trailers", 2);
  check_planes(*trailer, "trailer", 1);
  const int64_t n = trailers->size(1);
  LION_CHECK(n >= kSealWords, "trailers must have at least ", kSealWords, " words, got ", n);
  LION_CHECK(trailer->size(0) == n, "trailer must have ", n, " words, got ", trailer->size(0));
  LION_CHECK(trailers->size(0) == shards, "trailers must have a row for each of ", shards,
             " shards");
  LION_CHECK(
      shared->scalar_type() == dtypes::int64 && shared->dim() == 1 && shared->is_contiguous(),
      "shared must be contiguous int64 of one dimension, got ", shared->scalar_type(), " of shape ",
      shared->sizes());
  std::vector<int32_t> sealed(static_cast<size_t>(n));
  const size_t bytes = sealed.size() * sizeof(int32_t);
  std::memcpy(sealed.data(), trailer->const_data_ptr<int32_t>(), bytes);
  uint32_t words[2];
  std::memcpy(words, sealed.data() + n - 2, sizeof words);
  uint64_t digest = words[0] | static_cast<uint64_t>(words[1]) << 32;
  for (int64_t i = 0; i < shared->numel(); ++i)
    digest = mix64(digest ^ static_cast<uint64_t>(shared->const_data_ptr<int64_t>()[i]));
  words[0] = static_cast<uint32_t>(digest);
  words[1] = static_cast<uint32_t>(digest >> 32);
  std::memcpy(sealed.data() + n - 2, words, sizeof words);
  for (int64_t shard = 0; shard < shards; ++shard)
    std::memcpy(trailers->data_ptr<int32_t>() + shard * trailers->stride(0), sealed.data(), bytes);
}

}  // namespace

void cpu::encode(const MaybeTensors& grads, const Tensors& exp_avgs, const Tensor& ballot,
                 const OptionalTensor& blanks, double beta1, double beta2, bool maximize,
                 int64_t seed, int64_t rank, const Tensor& step, const Tensor& nonfinite,
                 const OptionalTensor& grad_scale, const OptionalTensor& found_inf, bool cautious,
                 const OptionalTensors& block_scales, int64_t first_word,
                 const OptionalTensor& trailers, const OptionalTensor& trailer,
                 const OptionalTensor& shared) {
  LION_CHECK(grads.size() == exp_avgs.size(), "grads and exp_avgs must have equal lengths, got ",
             grads.size(), " and ", exp_avgs.size());
  check_planes(ballot, "ballot", 3);
  LION_CHECK(ballot.size(1) == 1 || ballot.size(1) == 2,
             "ballot must have 1 plane (binary) or 2 (ternary), got ", ballot.size(1));
  const bool ternary = ballot.size(1) == 2;
  LION_CHECK(blanks.has_value() != ternary, "blanks must be ",
             ternary ? "None" : "there: one plane cannot say zero");
  if (blanks.has_value()) check_blanks(*blanks, "blanks", ballot.size(0), ballot.size(2));
  Lists lists(exp_avgs.size(), &block_scales, kNearest, nullptr, first_word);
  for (size_t i = 0; i < exp_avgs.size(); ++i) {
    const OptionalTensor& g = grads[i];
    const Tensor& m = exp_avgs[i];
    lists.append({nullptr, g.has_value() ? &*g : nullptr, &m}, m);
  }
  check_room(first_word, lists.end_word(), ballot, "ballot");
  const int64_t count = count_of(step, "step");
  const uint64_t key = coin_key(seed, kZeroStream, count >> 1);
  const uint32_t flip = (rank + count) % 2 == 0 ? 0u : ~0u;  // the other side of every coin
  count_of(nonfinite, "nonfinite");
  const LionScalars scalars = scalars_of(beta1, beta2, 0.0, 0.0, maximize, grad_scale);
  const bool is_skipped = is_set(found_inf);
  write_trailers(trailers, trailer, shared, ballot.size(0));
  if (is_skipped) return;
  auto* words = reinterpret_cast<uint32_t*>(ballot.data_ptr<int32_t>());
  auto* blank = ternary ? nullptr : reinterpret_cast<uint8_t*>(blanks->data_ptr<int32_t>());
  const int64_t shard_stride = ballot.stride(0), plane_stride = ballot.stride(1);
  const int64_t blank_stride =
      ternary ? 0 : blanks->stride(0) * static_cast<int64_t>(sizeof(int32_t));
  const SimdLevel& kernels = simd_level();
  std::atomic<int64_t> skipped{0};
  const auto& encodes = kernels.encode[cautious];
  // Calls visit(segment, where its ballot goes) for the pieces of a segment in each shard.
  const auto for_each_piece = [&](size_t t, const Segment& run, const auto& visit) {
    const auto go = [&](int64_t shard, int64_t word, int64_t place, const Segment& s) {
      uint32_t* plane0 = words + shard * shard_stride + word;
      BallotRun to{plane0, nullptr, nullptr, key, static_cast<uint64_t>(place), flip};
      if (ternary) {
        to.plane1 = plane0 + plane_stride;
      } else {
        to.blanks = blank + shard * blank_stride + word / kOctet;
        std::memset(to.blanks, 0, static_cast<size_t>(octets_of(words_of(s.count))));
      }
      visit(s, to);
      if (s.offset + s.count == lists[t].numel) pad(s.count, to);
    };
    lists.for_each_piece(ballot.size(2), t, run, go);
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
  if (skipped != 0) count_up(nonfinite, skipped);
}

}  // namespace lion
