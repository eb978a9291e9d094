// AVX2: the 8 bits of a byte choose, from a table, where each lane takes its value from.

#include "job.h"

#ifdef GRAPHPRUNE_X86
#define GRAPHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#include "rows_simd.h"

namespace graphprune {
namespace {

struct Places {
  // For a byte and a lane: the set bits below that lane, with the high bit set if its own isn't.
  uint8_t of[256][8];

  constexpr Places() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      uint8_t before = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool set = (byte >> lane) & 1;
        of[byte][lane] = static_cast<uint8_t>(set ? before++ : 0x80);
      }
    }
  }
};

constexpr Places kPlaces;

// The lanes whose place has the high bit become zero.
GRAPHPRUNE_INLINE __m256 spread(uint64_t bits, __m256 values) {
  const void* entry = kPlaces.of[bits & 255];
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(entry));
  const __m256i places = _mm256_cvtepi8_epi32(bytes);
  const __m256 moved = _mm256_permutevar8x32_ps(values, places);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), moved);
}

struct Sums256 {
  using Input = float;
  using Lanes = __m256;
  using Sums = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kDecodedRows = 2;

  static constexpr int rows_for(int tokens) { return tokens == 3 || tokens == 4 ? 2 : 1; }

  GRAPHPRUNE_INLINE Lanes load(const float* from) { return _mm256_loadu_ps(from); }
  GRAPHPRUNE_INLINE void store(float* to, Lanes lanes) { _mm256_storeu_ps(to, lanes); }
  GRAPHPRUNE_INLINE Sums zero() { return _mm256_setzero_ps(); }
  GRAPHPRUNE_INLINE Sums add(Sums a, Sums b) { return _mm256_add_ps(a, b); }
  GRAPHPRUNE_INLINE Sums multiply_add(Sums sums, Lanes a, Lanes b) {
    return _mm256_fmadd_ps(a, b, sums);
  }
  GRAPHPRUNE_INLINE float total(Sums sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

struct Float32 : Sums256 {
  using Value = float;

  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    return spread(bits, _mm256_loadu_ps(values));
  }
};

struct Bfloat16 : Sums256 {
  using Value = uint16_t;

  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16);
    return spread(bits, _mm256_castsi256_ps(wide));
  }
};

struct Float16 : Sums256 {
  using Value = uint16_t;

  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return spread(bits, _mm256_cvtph_ps(packed));
  }
};

bool supported() {
  // Every processor with AVX2 and FMA has F16C, which GCC before 11 can't be asked about.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}

}  // namespace

const Variant kAvx2 = {"avx2",
                       supported,
                       {multiply_rows<Float32>, multiply_rows<Bfloat16>, multiply_rows<Float16>},
                       nullptr};

}  // namespace graphprune
#endif
