// What the AVX-512 variants share: 16 sums in float32.

#ifndef GRAPHPRUNE_ROWS_AVX512_H
#define GRAPHPRUNE_ROWS_AVX512_H

#include "rows_simd.h"

namespace graphprune {
namespace {

// Expansions would be folded with their loads, which some processors take apart slowly. This keeps
// the compiler from it.
GRAPHPRUNE_INLINE __m512i in_register(__m512i loaded) {
  asm("" : "+v"(loaded));
  return loaded;
}

// Bits of a step, so that the compiler shifts them here and not in the slower mask registers.
GRAPHPRUNE_INLINE uint32_t in_register(uint64_t bits) {
  uint32_t low = static_cast<uint32_t>(bits);
  asm("" : "+r"(low));
  return low;
}

// Zeros to expand into. Expansions that clear the other lanes themselves wait for the register's
// old content on Zen 4, so that one waits for the other: this took twice as long.
GRAPHPRUNE_INLINE __m512i fresh_zeros() {
  __m512i zeros;
  asm("vpxor %x0, %x0, %x0" : "=x"(zeros));
  return zeros;
}

struct Sums512 {
  using Input = float;
  using Lanes = __m512;
  using Sums = __m512;
  static constexpr int kLanes = 16;

  static constexpr int kDecodedRows = 4;

  // With one row, memory is read in order; more of them share what is read of x. Measured.
  static constexpr int rows_for(int tokens) { return tokens <= 2 ? 1 : tokens <= 4 ? 4 : 2; }

  GRAPHPRUNE_INLINE Lanes load(const float* from) { return _mm512_loadu_ps(from); }
  GRAPHPRUNE_INLINE void store(float* to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }
  GRAPHPRUNE_INLINE Sums zero() { return _mm512_setzero_ps(); }
  GRAPHPRUNE_INLINE Sums add(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  GRAPHPRUNE_INLINE float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
  GRAPHPRUNE_INLINE Sums multiply_add(Sums sums, Lanes a, Lanes b) {
    return _mm512_fmadd_ps(a, b, sums);
  }
};

}  // namespace
}  // namespace graphprune
#endif
