// AVX-512: `vexpandps` puts 16 values at the places of set bits.

#include "job.h"

#ifdef GRAPHPRUNE_X86
#define GRAPHPRUNE_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi,bmi2")))
#include "rows_avx512.h"

namespace graphprune {
namespace {

GRAPHPRUNE_INLINE __m512 spread(uint64_t bits, __m512i packed) {
  const __mmask16 mask = static_cast<__mmask16>(in_register(bits));
  const __m512 zeros = _mm512_castsi512_ps(fresh_zeros());
  return _mm512_mask_expand_ps(zeros, mask, _mm512_castsi512_ps(packed));
}

struct Float32 : Sums512 {
  using Value = float;

  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    return spread(bits, in_register(_mm512_loadu_si512(values)));
  }
};

struct Bfloat16 : Sums512 {
  using Value = uint16_t;

  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return spread(bits, _mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16));
  }
};

struct Float16 : Sums512 {
  using Value = uint16_t;

  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return spread(bits, _mm512_castps_si512(_mm512_cvtph_ps(packed)));
  }
};

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace

const Variant kAvx512 = {"avx512",
                         supported,
                         {multiply_rows<Float32>, multiply_rows<Bfloat16>, multiply_rows<Float16>},
                         nullptr};

}  // namespace graphprune
#endif
