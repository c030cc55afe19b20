// Bit-sliced integers: word operations that count 32 (or 512) votes at once.
//
// A vector of small unsigned integers is held as planes: plane b holds bit b of every element, one
// bit an element. Everything here is written on a `Word` that only needs & | ^ ~: uint32_t, a SIMD
// vector of them, or a CUDA vector type. The same code is compiled for host and device, so the CPU
// tests cover the arithmetic of the GPU kernel. Knows no tensors, no ranks and no buffers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LION_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LION_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace lion {

constexpr int kBitsPerWord = 32;
// Tallies up to scale 2^16 - 1: 1024 ranks with ternary ballots need 12.
constexpr int kMaxPlanes = 16;

// a + b + c per bit (5 operations). `sum` may be one of the operands. Words go by reference: Clang
// refuses vectors by value between functions of different targets.
template <class Word>
LION_HOST_DEVICE void full_add(const Word& a, const Word& b, const Word& c, Word& sum,
                               Word& carry) {
  const Word half = a ^ b;
  carry = (a & b) | (half & c);
  sum = half ^ c;
}

// Adds one bit of weight 2^level to the integers in planes[0 .. n_planes).
template <class Word, int kSize>
LION_HOST_DEVICE void add_bit(Word (&planes)[kSize], int n_planes, int level, const Word& bit) {
  Word carry = bit;
  for (int b = level; b < n_planes; ++b) {
    const Word sum = planes[b] ^ carry;
    carry = planes[b] & carry;
    planes[b] = sum;
  }
}

// Adds eight bits of weight 2^level with a tree of seven carry-save adders and one ripple: 35 word
// operations and 2 a remaining plane, for eight ballots of 32 elements a word. Planes at and above
// n_planes must be zero and stay zero: the caller has made room for the sum.
template <class Word, int kSize>
LION_HOST_DEVICE void add_eight_bits(Word (&planes)[kSize], int n_planes, int level,
                                     const Word (&bits)[8]) {
  Word ones = planes[level];
  Word twos = level + 1 < n_planes ? planes[level + 1] : Word{};
  Word fours = level + 2 < n_planes ? planes[level + 2] : Word{};
  Word two_a, two_b, four_a, four_b, eight;
  full_add(ones, bits[0], bits[1], ones, two_a);
  full_add(ones, bits[2], bits[3], ones, two_b);
  full_add(twos, two_a, two_b, twos, four_a);
  full_add(ones, bits[4], bits[5], ones, two_a);
  full_add(ones, bits[6], bits[7], ones, two_b);
  full_add(twos, two_a, two_b, twos, four_b);
  full_add(fours, four_a, four_b, fours, eight);
  planes[level] = ones;
  if (level + 1 < n_planes) planes[level + 1] = twos;
  if (level + 2 < n_planes) planes[level + 2] = fours;
  add_bit(planes, n_planes, level + 3, eight);
}

// Compares the integers with a constant: `above` where they exceed it, `equal` where they match.
template <class Word, int kSize>
LION_HOST_DEVICE void compare(const Word (&planes)[kSize], int n_planes, uint32_t constant,
                              Word& above, Word& equal) {
  above = Word{};
  equal = ~Word{};
  for (int b = n_planes - 1; b >= 0; --b) {
    if ((constant >> b) & 1u) {
      equal = equal & planes[b];
    } else {
      above = above | (equal & planes[b]);
      equal = equal & ~planes[b];
    }
  }
}

// Blank words of ballots of one plane. A blank word counts as half of its ballot's weight, for all
// of its elements alike. Halves are added up in pairs: `odd` is all ones in words where one is left
// over, which is the case where the weight of the blank ballots so far is odd. `blank` is all ones
// in the words that a ballot leaves blank. Both start as 0, and are 0 where nothing can be blank.

// Of a ballot of weight 1: replaces the bits of blank words by what those add.
template <class Word>
LION_HOST_DEVICE void pair_halves(const Word& blank, Word& odd, Word& bits) {
  bits = (bits & ~blank) | (blank & odd);
  odd = odd ^ blank;
}

// Adds `weight` times a ballot's bits of weight 2^level, with a full adder a plane; of blank words,
// whose level is 0, weight / 2.
template <class Word, int kSize>
LION_HOST_DEVICE void add_weighted(Word (&planes)[kSize], int n_planes, int level, uint32_t weight,
                                   const Word& blank, Word& odd, const Word& bits) {
  const Word votes = bits & ~blank;
  Word carry{};
  if (weight & 1u) {
    carry = blank & odd;
    odd = odd ^ blank;
  }
  for (int b = level; b < n_planes; ++b, weight >>= 1) {
    Word bit{}, next;
    if (weight & 1u) bit = votes;
    if (weight & 2u) bit = bit | blank;
    full_add(planes[b], bit, carry, planes[b], next);
    carry = next;
  }
}

// Compares the integers, and the halves left over, with half the scale: `won` where they are more,
// `tied` where they are equal.
template <class Word, int kSize>
LION_HOST_DEVICE void compare_with_half(const Word (&planes)[kSize], int n_planes, uint32_t scale,
                                        const Word& odd, Word& won, Word& tied) {
  Word equal;
  compare(planes, n_planes, scale / 2, won, equal);
  if (scale % 2 == 0) {
    won = won | (equal & odd);
    tied = equal & ~odd;
  } else {
    tied = equal & odd;
  }
}

}  // namespace lion
