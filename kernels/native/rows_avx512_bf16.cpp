// AVX-512 with VBMI2 and BF16: `vpexpandw` puts 32 values at the places of set bits, and
// `vdpbf16ps` multiplies them with as many of x, two to a sum.

#include "job.h"

#ifdef GRAPHPRUNE_X86
#define GRAPHPRUNE_TARGET                                                                       \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c," \
                        "popcnt,bmi,bmi2")))
#include "rows_avx512.h"

namespace graphprune {
namespace {

struct Dot : Sums512 {
  using Value = uint16_t;
  using Input = uint16_t;
  using Lanes = __m512i;
  static constexpr int kLanes = 32;

  GRAPHPRUNE_INLINE Lanes load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  GRAPHPRUNE_INLINE void store(uint16_t* to, Lanes lanes) { _mm512_storeu_si512(to, lanes); }
  GRAPHPRUNE_INLINE Lanes expand(uint64_t bits, const Value* values) {
    const __mmask32 mask = in_register(bits);
    return _mm512_mask_expand_epi16(fresh_zeros(), mask, in_register(_mm512_loadu_si512(values)));
  }
  GRAPHPRUNE_INLINE Sums multiply_add(Sums sums, Lanes a, Lanes b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
  }
};

bool supported() {
  return kAvx512.supported() && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace

// Other types have nothing to gain from these instructions.
const Variant kAvx512Bf16 = {"avx512_bf16", supported, {nullptr, nullptr, nullptr},
                             multiply_rows<Dot>};

}  // namespace graphprune
#endif
