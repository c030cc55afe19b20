// encode, apply and lion_step over lists of CPU tensors: one parallel region a call.
//
// Checks and scalars; runs.h walks the lists, the row kernels compute.
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "coin.h"
#include "cpu.h"
#include "runs.h"

namespace lion {
namespace {

// The optional scalar of a torch.amp.GradScaler, or what its absence means.
double amp_scalar(const std::optional<at::Tensor>& tensor, const char* name, double absent) {
  if (!tensor.has_value()) return absent;
  TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat, name, " must be float32, got ",
                    tensor->scalar_type());
  return scalar_value(*tensor, name);
}

bool is_set(const std::optional<at::Tensor>& found_inf) {
  return amp_scalar(found_inf, "found_inf", 0.0) != 0.0;
}

// The complements of the betas are what gradients are multiplied by: maximize and grad_scale go
// into them.
LionScalars scalars_of(double beta1, double beta2, double lr, double weight_decay, bool maximize,
                       const std::optional<at::Tensor>& grad_scale) {
  const double sign = maximize ? -1.0 : 1.0;
  const auto scale = static_cast<float>(amp_scalar(grad_scale, "grad_scale", 1.0));
  LionScalars s{};
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(sign * (1.0 - beta1)) / scale;
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(sign * (1.0 - beta2)) / scale;
  s.lr = static_cast<float>(lr);
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  return s;
}

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

using OptionalTensors = std::optional<c10::List<at::Tensor>>;

Rounding rounding_of(c10::string_view name) {
  if (name == "nearest") return kNearest;
  if (name == "stochastic") return kStochastic;
  TORCH_CHECK_VALUE(name == "compensated",
                    "rounding must be nearest, stochastic or compensated, got ", name);
  return kCompensated;
}

// What the storage type of parameter i drops is kept in lows[i].
void* low_of(Rounding rounding, const OptionalTensors& lows, int64_t i, const at::Tensor& p) {
  if (rounding != kCompensated || p.scalar_type() == at::kFloat) return p.data_ptr();
  const at::Tensor low = lows->get(static_cast<size_t>(i));
  const auto wanted = p.scalar_type() == at::kBFloat16 ? at::kShort : at::kHalf;
  TORCH_CHECK_VALUE(low.scalar_type() == wanted && low.device() == p.device(), "lows[", i,
                    "] must be ", wanted, " on ", p.device(), ", got ", low.scalar_type(), " on ",
                    low.device());
  check_dense(low, "lows", i, &p);
  return low.data_ptr();
}

void check_rounding(Rounding rounding, const OptionalTensors& lows, size_t n_params,
                    const std::optional<at::Tensor>& step) {
  const size_t wanted = rounding == kCompensated ? n_params : 0;
  const size_t n_lows = lows.has_value() ? lows->size() : 0;
  TORCH_CHECK_VALUE(n_lows == wanted, "lows must have ", wanted, " tensors, got ", n_lows);
  TORCH_CHECK_VALUE(rounding != kStochastic || step.has_value(),
                    "stochastic rounding needs step, the counter of its random bits");
}

uint64_t rounding_key(Rounding rounding, int64_t seed, const std::optional<at::Tensor>& step) {
  if (rounding != kStochastic) return 0;
  return coin_key(seed, kRoundingStream, static_cast<int64_t>(scalar_value(*step, "step")));
}

void check_exp_avg(const at::Tensor& exp_avg, int64_t i, const at::Tensor& like) {
  TORCH_CHECK_VALUE(exp_avg.device() == like.device(), "exp_avgs[", i, "] must be on ",
                    like.device(), ", got ", exp_avg.device());
  check_dense(exp_avg, "exp_avgs", i, &like);
}

DType momentum_dtype_of(const at::Tensor& exp_avg, int64_t i) {
  return exp_avg.scalar_type() == at::kChar ? kInt8 : dtype_of(exp_avg, "exp_avgs", i);
}

// The scales of an int8 momentum, one a block.
float* scales_of(const at::Tensor& exp_avg, int64_t i, size_t n_exp_avgs,
                 const OptionalTensors& scales) {
  if (exp_avg.scalar_type() != at::kChar) return nullptr;
  const size_t n_scales = scales.has_value() ? scales->size() : 0;
  TORCH_CHECK_VALUE(n_scales == n_exp_avgs, "scales must have ", n_exp_avgs, " tensors, got ",
                    n_scales);
  const at::Tensor scale = scales->get(static_cast<size_t>(i));
  const int64_t blocks = (exp_avg.numel() + kBlock - 1) / kBlock;
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.device() == exp_avg.device() &&
                        scale.dim() == 1 && scale.numel() == blocks && scale.is_contiguous(),
                    "scales[", i, "] must be contiguous float32 of shape [", blocks, "] on ",
                    exp_avg.device(), ", got ", scale.scalar_type(), " of shape ", scale.sizes(),
                    " with strides ", scale.strides(), " on ", scale.device());
  return scale.data_ptr<float>();
}

void check_flags(const at::Tensor& flags, const char* name, size_t n_tensors) {
  TORCH_CHECK_VALUE(words_of(static_cast<int64_t>(n_tensors)) <= flags.size(1), name, " has ",
                    flags.size(1) * kBitsPerWord, " flags, got ", n_tensors, " tensors");
}

void check_room(int64_t n_words, const at::Tensor& planes, const char* name) {
  TORCH_CHECK_VALUE(n_words <= planes.size(0) * planes.size(2), name, " of shape ", planes.sizes(),
                    " has room for ", planes.size(0) * planes.size(2),
                    " words a plane, the tensors need ", n_words);
}

// The gradients and momenta of a list, each pair in one device and memory layout.
std::vector<Item> pairs_of(at::TensorList grads, at::TensorList exp_avgs,
                           const OptionalTensors& scales, WordSpace& space) {
  TORCH_CHECK_VALUE(grads.size() == exp_avgs.size(),
                    "grads and exp_avgs must have equal lengths, got ", grads.size(), " and ",
                    exp_avgs.size());
  std::vector<Item> items;
  items.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor &g = grads[i], &m = exp_avgs[i];
    const auto index = static_cast<int64_t>(i);
    check_dense(g, "grads", index);
    check_exp_avg(m, index, g);
    items.push_back({nullptr, g.const_data_ptr(), m.data_ptr(), g.numel(),
                     static_cast<int64_t>(g.element_size()), static_cast<int64_t>(m.element_size()),
                     dtype_of(g, "grads", index), momentum_dtype_of(m, index), nullptr,
                     scales_of(m, index, exp_avgs.size(), scales)});
    space.append(g.numel());
  }
  return items;
}

void check_agreeing(const at::Tensor& agreeing, size_t n_tensors) {
  TORCH_CHECK_VALUE(agreeing.scalar_type() == at::kLong && agreeing.dim() == 1 &&
                        agreeing.size(0) == static_cast<int64_t>(n_tensors) &&
                        agreeing.is_contiguous(),
                    "agreeing must be contiguous int64 of shape [", n_tensors, "], got ",
                    agreeing.scalar_type(), " of shape ", agreeing.sizes());
}

void count_agreeing(at::TensorList grads, at::TensorList exp_avgs, const at::Tensor& agreeing,
                    double beta1, bool maximize, const std::optional<at::Tensor>& grad_scale,
                    const OptionalTensors& scales) {
  WordSpace space;
  const std::vector<Item> items = pairs_of(grads, exp_avgs, scales, space);
  check_agreeing(agreeing, items.size());
  const LionScalars scalars = scalars_of(beta1, 0.0, 0.0, 0.0, maximize, grad_scale);
  const RowKernels& kernels = rows();
  std::vector<std::atomic<int64_t>> counts(items.size());
  space.for_each_run([&](size_t t, int64_t begin, int64_t end) {
    const Item& item = items[t];
    const Segment run = segment_of(space, t, begin, end, item.numel);
    for_each_chunk<false>(kernels, item, run, [&](const Segment& s, void* m, DType m_dtype) {
      counts[t] += kernels.agree[item.dtype][m_dtype](advance(item.grad, s.offset * item.data_size),
                                                      m, s.count, scalars);
    });
  });
  for (size_t t = 0; t < items.size(); ++t) agreeing.data_ptr<int64_t>()[t] += counts[t];
}

// What cautious updates are multiplied by: elements over those that agree (and one).
float rescale_of(const std::optional<at::Tensor>& agreeing, size_t t, int64_t numel) {
  if (!agreeing.has_value()) return 1.0f;
  const int64_t count = agreeing->const_data_ptr<int64_t>()[t];
  return static_cast<float>(numel) / static_cast<float>(count + 1);
}

void lion_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
               const at::Tensor& lr, double beta1, double beta2, double weight_decay, bool maximize,
               const std::optional<at::Tensor>& nonfinite,
               const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf, c10::string_view rounding_name,
               const OptionalTensors& lows, int64_t seed, const std::optional<at::Tensor>& step,
               bool cautious, bool cautious_decay, const OptionalTensors& scales,
               const std::optional<at::Tensor>& agreeing) {
  const Rounding rounding = rounding_of(rounding_name);
  check_rounding(rounding, lows, params.size(), step);
  TORCH_CHECK_VALUE(params.size() == grads.size() && params.size() == exp_avgs.size(),
                    "params, grads and exp_avgs must have equal lengths, got ", params.size(), ", ",
                    grads.size(), " and ", exp_avgs.size());
  WordSpace space;
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor &p = params[i], &g = grads[i], &m = exp_avgs[i];
    const auto index = static_cast<int64_t>(i);
    check_dense(p, "params", index);
    TORCH_CHECK_VALUE(g.device() == p.device() && g.scalar_type() == p.scalar_type(), "grads[", i,
                      "] must be ", p.scalar_type(), " on ", p.device(), ", got ", g.scalar_type(),
                      " on ", g.device());
    check_dense(g, "grads", index, &p);
    check_exp_avg(m, index, p);
    items.push_back({p.data_ptr(), g.const_data_ptr(), m.data_ptr(), p.numel(),
                     static_cast<int64_t>(p.element_size()), static_cast<int64_t>(m.element_size()),
                     dtype_of(p, "params", index), momentum_dtype_of(m, index),
                     low_of(rounding, lows, index, p),
                     scales_of(m, index, exp_avgs.size(), scales)});
    space.append(p.numel());
  }
  if (agreeing.has_value()) {
    TORCH_CHECK_VALUE(cautious, "agreeing rescales a cautious update, got cautious=False");
    check_agreeing(*agreeing, items.size());
  }
  const uint64_t key = rounding_key(rounding, seed, step);
  LionScalars scalars =
      scalars_of(beta1, beta2, scalar_value(lr, "lr"), weight_decay, maximize, grad_scale);
  scalars.skip_nonfinite = nonfinite.has_value();
  scalars.cautious = cautious;
  scalars.cautious_decay = cautious_decay;
  if (is_set(found_inf)) return;
  const RowKernels& kernels = rows();
  const auto& steps = kernels.step[!scalars.is_plain()][rounding];
  std::atomic<int64_t> skipped{0};
  space.for_each_run([&](size_t t, int64_t begin, int64_t end) {
    const Item& item = items[t];
    const Segment run = segment_of(space, t, begin, end, item.numel);
    LionScalars own = scalars;
    own.lr *= rescale_of(agreeing, t, item.numel);
    for_each_chunk(kernels, item, run, [&](const Segment& s, void* m, DType m_dtype) {
      const int64_t n = steps[item.dtype][m_dtype](
          advance(item.data, s.offset * item.data_size),
          advance(item.grad, s.offset * item.data_size), m,
          advance(item.low, s.offset * item.data_size), s.count, own,
          RoundingRun{key, static_cast<uint64_t>(space.first[t] + s.offset / kBitsPerWord)});
      if (n != 0) skipped += n;
    });
  });
  if (step.has_value()) step->add_(1);
  if (nonfinite.has_value() && skipped != 0) nonfinite->add_(skipped.load());
}

void encode(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList exp_avgs,
            const at::Tensor& ballot, const at::Tensor& flags, double beta1, double beta2,
            bool maximize, int64_t seed, int64_t rank, const at::Tensor& step,
            const at::Tensor& nonfinite, const std::optional<at::Tensor>& grad_scale,
            const std::optional<at::Tensor>& found_inf, bool cautious,
            const OptionalTensors& scales) {
  TORCH_CHECK_VALUE(grads.size() == exp_avgs.size(),
                    "grads and exp_avgs must have equal lengths, got ", grads.size(), " and ",
                    exp_avgs.size());
  check_planes(ballot, "ballot", 3);
  TORCH_CHECK_VALUE(ballot.size(1) == 1 || ballot.size(1) == 2,
                    "ballot must have 1 plane (binary) or 2 (ternary), got ", ballot.size(1));
  WordSpace space;
  std::vector<Item> items;
  items.reserve(exp_avgs.size());
  std::vector<uint32_t> present(static_cast<size_t>(words_of(exp_avgs.size())), 0u);
  for (size_t i = 0; i < exp_avgs.size(); ++i) {
    const at::Tensor& m = exp_avgs[i];
    const auto index = static_cast<int64_t>(i);
    Item item{nullptr,
              nullptr,
              m.data_ptr(),
              m.numel(),
              0,
              static_cast<int64_t>(m.element_size()),
              kFloat32,
              momentum_dtype_of(m, index),
              nullptr,
              scales_of(m, index, exp_avgs.size(), scales)};
    check_dense(m, "exp_avgs", index);
    const std::optional<at::Tensor> g = grads.get(i);
    if (g.has_value()) {
      TORCH_CHECK_VALUE(g->device() == m.device(), "grads[", i, "] must be on ", m.device(),
                        ", got ", g->device());
      check_dense(*g, "grads", index, &m);
      item.grad = g->const_data_ptr();
      item.dtype = dtype_of(*g, "grads", index);
      item.data_size = static_cast<int64_t>(g->element_size());
      present[i / kBitsPerWord] |= 1u << (i % kBitsPerWord);
    }
    items.push_back(item);
    space.append(m.numel());
  }
  check_room(space.n_words(), ballot, "ballot");
  check_planes(flags, "flags", 2);
  TORCH_CHECK_VALUE(flags.size(0) == ballot.size(0), "flags must have a row for each of ",
                    ballot.size(0), " shards, got ", flags.size(0));
  check_flags(flags, "flags", exp_avgs.size());

  const bool ternary = ballot.size(1) == 2;
  const uint64_t key = coin_key(seed, rank, static_cast<int64_t>(scalar_value(step, "step")));
  const LionScalars scalars = scalars_of(beta1, beta2, 0.0, 0.0, maximize, grad_scale);
  if (is_set(found_inf)) return;
  auto* words = reinterpret_cast<uint32_t*>(ballot.data_ptr<int32_t>());
  const int64_t words_per_shard = ballot.size(2);
  const int64_t shard_stride = ballot.stride(0), plane_stride = ballot.stride(1);
  const RowKernels& kernels = rows();
  std::atomic<int64_t> skipped{0};
  const auto& encodes = kernels.encode[cautious];
  // Calls visit(segment, where its ballot goes) for the pieces of [first, last) in each shard.
  const auto for_each_piece = [&](size_t t, int64_t first, int64_t last, auto visit) {
    split_by_shard(words_per_shard, first, last,
                   [&](int64_t shard, int64_t word, int64_t begin, int64_t end) {
                     uint32_t* plane0 = words + shard * shard_stride + word;
                     visit(segment_of(space, t, begin, end, items[t].numel),
                           BallotRun{plane0, ternary ? plane0 + plane_stride : nullptr, key,
                                     static_cast<uint64_t>(begin)});
                   });
  };
  space.for_each_run([&](size_t t, int64_t first, int64_t last) {
    const Item& item = items[t];
    if (item.grad == nullptr)
      return for_each_piece(t, first, last,
                            [](const Segment& s, const BallotRun& run) { abstain(s.count, run); });
    const Segment whole = segment_of(space, t, first, last, item.numel);
    for_each_chunk(kernels, item, whole, [&](const Segment& chunk, void* m, DType m_dtype) {
      const int64_t begin = space.first[t] + chunk.offset / kBitsPerWord;
      const int64_t m_size = m_dtype == kFloat32 ? sizeof(float) : item.exp_avg_size;
      for_each_piece(t, begin, begin + words_of(chunk.count),
                     [&](const Segment& s, const BallotRun& run) {
                       const int64_t n = encodes[item.dtype][m_dtype](
                           advance(item.grad, s.offset * item.data_size),
                           advance(m, (s.offset - chunk.offset) * m_size), s.count, scalars, run);
                       if (n != 0) skipped += n;
                     });
    });
  });
  // Words behind the last tensor: the buffer may hold anything.
  split_by_shard(words_per_shard, space.n_words(), ballot.size(0) * words_per_shard,
                 [&](int64_t shard, int64_t word, int64_t begin, int64_t end) {
                   for (int64_t b = 0; b < ballot.size(1); ++b)
                     std::fill_n(words + shard * shard_stride + b * plane_stride + word,
                                 end - begin, 0u);
                 });
  present.resize(static_cast<size_t>(flags.size(1)), 0u);
  for (int64_t shard = 0; shard < flags.size(0); ++shard)
    std::memcpy(flags.data_ptr<int32_t>() + shard * flags.stride(0), present.data(),
                present.size() * sizeof(uint32_t));
  if (skipped != 0) nonfinite.add_(skipped.load());
}

void apply(at::TensorList params, const at::Tensor& verdict, const at::Tensor& presence,
           int64_t scale, const at::Tensor& lr, double weight_decay, const at::Tensor& step,
           const std::optional<at::Tensor>& found_inf, c10::string_view rounding_name,
           const OptionalTensors& lows, int64_t seed, bool cautious_decay) {
  const Rounding rounding = rounding_of(rounding_name);
  check_rounding(rounding, lows, params.size(), step);
  check_planes(verdict, "verdict", 3);
  check_planes(presence, "presence", 2);
  TORCH_CHECK_VALUE(verdict.size(1) >= 1 && verdict.size(1) <= kMaxPlanes,
                    "verdict must have 1 to ", kMaxPlanes, " planes, got ", verdict.size(1));
  TORCH_CHECK_VALUE(scale >= 1, "scale must be at least 1, got ", scale);
  check_flags(presence, "presence", params.size());
  WordSpace space;
  std::vector<Item> items;
  items.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& p = params[i];
    const auto index = static_cast<int64_t>(i);
    check_dense(p, "params", index);
    int32_t any = 0;
    const int32_t* flags = presence.const_data_ptr<int32_t>() + index / kBitsPerWord;
    for (int64_t r = 0; r < presence.size(0); ++r) any |= flags[r * presence.stride(0)];
    const bool present = (static_cast<uint32_t>(any) >> (index % kBitsPerWord)) & 1u;
    items.push_back({present ? p.data_ptr() : nullptr, nullptr, nullptr, p.numel(),
                     static_cast<int64_t>(p.element_size()), 0, dtype_of(p, "params", index),
                     kFloat32, low_of(rounding, lows, index, p), nullptr});
    space.append(p.numel());
  }
  check_room(space.n_words(), verdict, "verdict");

  const double lr_value = scalar_value(lr, "lr");
  TORCH_CHECK_VALUE(step.numel() == 1, "step must have one element, got shape ", step.sizes());
  const uint64_t key = rounding_key(rounding, seed, step);
  if (is_set(found_inf)) return;
  const auto* words = reinterpret_cast<const uint32_t*>(verdict.const_data_ptr<int32_t>());
  VerdictRun shape{nullptr,
                   verdict.stride(1),
                   static_cast<int>(verdict.size(1)),
                   static_cast<float>(scale),
                   static_cast<float>(lr_value * (1.0 / static_cast<double>(scale))),
                   static_cast<float>(1.0 - lr_value * weight_decay)};
  const RowKernels& kernels = rows();
  space.for_each_run([&](size_t t, int64_t first, int64_t last) {
    const Item& item = items[t];
    if (item.data == nullptr) return;
    split_by_shard(verdict.size(2), first, last,
                   [&](int64_t shard, int64_t word, int64_t begin, int64_t end) {
                     VerdictRun run = shape;
                     run.plane0 = words + shard * verdict.stride(0) + word;
                     const Segment s = segment_of(space, t, begin, end, item.numel);
                     kernels.apply[cautious_decay][rounding][item.dtype](
                         advance(item.data, s.offset * item.data_size),
                         advance(item.low, s.offset * item.data_size), s.count, run,
                         RoundingRun{key, static_cast<uint64_t>(begin)});
                   });
  });
  step.add_(1);
}

}  // namespace

TORCH_LIBRARY_IMPL(lion_kernels, CPU, m) {
  m.impl("lion_step", lion_step);
  m.impl("count_agreeing", count_agreeing);
  m.impl("encode", encode);
  m.impl("apply", apply);
}

}  // namespace lion
