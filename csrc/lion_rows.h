// encode, apply and lion_step on one contiguous run of elements, 32 at a time (one ballot word).
//
// Included inside the namespace of a SIMD level, after simd.h. The arithmetic of all three rooms
// stands here once:  c = fma(1 - beta1, g, beta1 * m),  p = fma(p, decay, -step).

constexpr int kVecs = kBitsPerWord / Vec::kLanes;  // vectors a ballot word

// Stores one word's elements. The bf16 form of a level that can round two vectors together is in
// simd.h.
template <class T>
inline void store_word(T* x, const Vec (&a)[kVecs]) {
  for (int j = 0; j < kVecs; ++j) store(x + j * Vec::kLanes, a[j]);
}

#include "rounding_rows.h"

struct Moments {
  Vec beta1, one_minus_beta1, beta2, one_minus_beta2;
  explicit Moments(const LionScalars& s)
      : beta1(fill(s.beta1)),
        one_minus_beta1(fill(s.one_minus_beta1)),
        beta2(fill(s.beta2)),
        one_minus_beta2(fill(s.one_minus_beta2)) {}
  Vec update(Vec g, Vec m) const { return fma(one_minus_beta1, g, multiply(beta1, m)); }
  Vec next(Vec g, Vec m) const { return fma(one_minus_beta2, g, multiply(beta2, m)); }
};

// Cautious Lion (arXiv:2411.16085): drops the lanes whose sign is not that of the gradient.
inline void keep_agreeing(const LionScalars& s, const Vec& g, uint32_t& up, uint32_t& down) {
  const Vec slope = multiply(g, fill(s.one_minus_beta1 < 0.0f ? -1.0f : 1.0f));
  up &= positive(slope);
  down &= negative(slope);
}

// Runs `word(offset, pointers...)` for every 32 elements; the last, partial word goes through
// zero-padded copies, so that the vector code never sees an edge. `valid` has a bit an element.
template <class Word, class... T>
inline void for_each_word(int64_t n, Word word, T*... data) {
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

template <bool kCautious, class G, class M>
int64_t encode_row(const void* g_data, void* m_data, int64_t n, const LionScalars& scalars,
                   const BallotRun& ballot) {
  const Moments moments(scalars);
  int64_t nonfinite = 0;
  for_each_word(
      n,
      [&](int64_t i, uint32_t valid, const G* g_word, M* m_word) {
        uint32_t plus = 0, minus = 0;
        Vec next[kVecs];
        for (int j = 0; j < kVecs; ++j) {
          const Vec g = load(g_word + j * Vec::kLanes), m = load(m_word + j * Vec::kLanes);
          const Vec c = moments.update(g, m);
          const uint32_t ok = finite(c);
          next[j] = moments.next(g, m);
          if (ok != kAllLanes) {
            next[j] = select(ok, next[j], m);
            nonfinite += __builtin_popcount(kAllLanes & ~ok);
          }
          uint32_t up = positive(c) & ok, down = negative(c) & ok;
          if constexpr (kCautious) keep_agreeing(scalars, g, up, down);
          plus |= up << (j * Vec::kLanes);
          minus |= down << (j * Vec::kLanes);
        }
        store_word(m_word, next);
        const uint32_t zero = valid & ~(plus | minus);
        if (ballot.plane1 != nullptr) {
          ballot.plane0[i] = zero;
          ballot.plane1[i] = plus;
        } else {
          ballot.plane0[i] =
              zero == 0 ? plus : plus | (zero & coins(ballot.coin_key, ballot.first_word + i));
        }
      },
      static_cast<const G*>(g_data), static_cast<M*>(m_data));
  return nonfinite;
}

template <class G, class M>
int64_t agree_row(const void* g_data, const void* m_data, int64_t n, const LionScalars& scalars) {
  const Moments moments(scalars);
  int64_t agreeing = 0;
  for_each_word(
      n,
      [&](int64_t, uint32_t, const G* g_word, const M* m_word) {
        for (int j = 0; j < kVecs; ++j) {
          const Vec g = load(g_word + j * Vec::kLanes), m = load(m_word + j * Vec::kLanes);
          const Vec c = moments.update(g, m);
          uint32_t up = positive(c), down = negative(c);
          keep_agreeing(scalars, g, up, down);
          agreeing += __builtin_popcount(up | down);
        }
      },
      static_cast<const G*>(g_data), static_cast<const M*>(m_data));
  return agreeing;
}

template <bool kPlain, int kRounding, class P, class M>
int64_t step_row(void* p_data, const void* g_data, void* m_data, void* low_data, int64_t n,
                 const LionScalars& scalars, const RoundingRun& rounding) {
  const Moments moments(scalars);
  const Vec lr = fill(scalars.lr), decay = fill(scalars.decay);
  const Vec one = fill(1.0f), minus_one = fill(-1.0f);
  int64_t nonfinite = 0;
  for_each_word(
      n,
      [&](int64_t i, uint32_t, P* p_word, const P* g_word, M* m_word, Low<kRounding, P>* low_word) {
        Vec next_p[kVecs], next_m[kVecs];
        for (int j = 0; j < kVecs; ++j) {
          const int at = j * Vec::kLanes;
          const Vec p = load_parameter<kRounding, P>(p_word + at, low_word + at);
          const Vec g = load(g_word + j * Vec::kLanes), m = load(m_word + j * Vec::kLanes);
          const Vec c = moments.update(g, m);
          next_m[j] = moments.next(g, m);
          if constexpr (kPlain) {
            // Neither above nor below 0: a zero, or a NaN that must stay visible.
            const Vec sign = select(positive(c), one, select(negative(c), minus_one, c));
            next_p[j] = fms(p, decay, multiply(lr, sign));
          } else {
            uint32_t up = positive(c), down = negative(c);
            const uint32_t ok = finite(c), nan = ~(up | down | ok);
            if (scalars.cautious) keep_agreeing(scalars, g, up, down);
            const Vec sign = select(up, one, select(down, minus_one, select(nan, c, fill(0.0f))));
            Vec kept = decay;
            // Cautious weight decay (arXiv:2510.12402).
            if (scalars.cautious_decay) kept = select(negative(multiply(sign, p)), one, decay);
            next_p[j] = fms(p, kept, multiply(lr, sign));
            if (scalars.skip_nonfinite && ok != kAllLanes) {
              next_p[j] = select(ok, next_p[j], p);
              next_m[j] = select(ok, next_m[j], m);
              nonfinite += __builtin_popcount(kAllLanes & ~ok);
            }
          }
        }
        store_parameters<kRounding, P>(p_word, low_word, next_p, rounding, i);
        store_word(m_word, next_m);
      },
      static_cast<P*>(p_data), static_cast<const P*>(g_data), static_cast<M*>(m_data),
      static_cast<Low<kRounding, P>*>(low_data));
  return nonfinite;
}

// kPlanes = 0: as many as the run says.
template <bool kCautiousDecay, int kRounding, class P, int kPlanes>
void apply_planes(P* p_data, Low<kRounding, P>* low_data, int64_t n, const VerdictRun& verdict,
                  const RoundingRun& rounding) {
  const int n_planes = kPlanes == 0 ? verdict.n_planes : kPlanes;
  const Vec decay = fill(verdict.decay), step_size = fill(verdict.step_size);
  const Vec lowest = fill(-verdict.scale);
  for_each_word(
      n,
      [&](int64_t i, uint32_t, P* p_word, Low<kRounding, P>* low_word) {
        Vec sum[kVecs];  // 2 * v - scale, exact in float32
        for (int j = 0; j < kVecs; ++j) sum[j] = lowest;
        float weight = 2.0f;
        for (int b = 0; b < n_planes; ++b, weight *= 2.0f) {
          const uint32_t bits = verdict.plane0[b * verdict.plane_stride + i];
          for (int j = 0; j < kVecs; ++j)
            sum[j] = add_where(sum[j], bits >> (j * Vec::kLanes), fill(weight));
        }
        for (int j = 0; j < kVecs; ++j) {
          const int at = j * Vec::kLanes;
          const Vec p = load_parameter<kRounding, P>(p_word + at, low_word + at);
          Vec kept = decay;
          if constexpr (kCautiousDecay)
            kept = select(negative(multiply(sum[j], p)), fill(1.0f), decay);
          sum[j] = fms(p, kept, multiply(step_size, sum[j]));
        }
        store_parameters<kRounding, P>(p_word, low_word, sum, rounding, i);
      },
      p_data, low_data);
}

template <bool kCautiousDecay, int kRounding, class P>
void apply_row(void* p_data, void* low_data, int64_t n, const VerdictRun& verdict,
               const RoundingRun& rounding) {
  P* p = static_cast<P*>(p_data);
  auto* low = static_cast<Low<kRounding, P>*>(low_data);
  if (verdict.n_planes == 1)
    return apply_planes<kCautiousDecay, kRounding, P, 1>(p, low, n, verdict, rounding);
  if (verdict.n_planes == 2)
    return apply_planes<kCautiousDecay, kRounding, P, 2>(p, low, n, verdict, rounding);
  apply_planes<kCautiousDecay, kRounding, P, 0>(p, low, n, verdict, rounding);
}
