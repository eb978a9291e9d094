// One product, as the variants of the code see it.

#ifndef GRAPHPRUNE_JOB_H
#define GRAPHPRUNE_JOB_H

#include <stdint.h>
#include <string.h>

#include "bitmap_linear.h"

namespace graphprune {

constexpr int64_t kGroup = 64;  // columns whose bits are read at a time
constexpr int64_t kBlock = 4;   // rows that are decoded together, counted from the first row

struct Job {
  graphprune_bitmap weight;
  int64_t row_bytes;  // of the bitmask
  int64_t tokens;
  // Rows of x are `stride` elements apart, a multiple of kGroup; zeros follow the last column.
  // float, or bfloat16 for the code that multiplies such numbers.
  const void* x;
  int64_t stride;
  int32_t io_type;  // of bias and y
  const void* bias;
  void* y;

  int64_t row_begin(int64_t row) const { return weight.row_offsets[row]; }
  int64_t row_end(int64_t row) const {
    return row + 1 < weight.rows ? weight.row_offsets[row + 1] : weight.nonzeros;
  }
};

// Computes the rows from `begin` (a multiple of kBlock) to `end`; false when memory runs out.
using Rows = bool (*)(const Job& job, int64_t begin, int64_t end);

struct Variant {
  const char* name;
  bool (*supported)();
  Rows rows[3];  // by type of the values, for x in float32
  Rows dot;      // for x and values in bfloat16, where that is multiplied as it is; or null
};

extern const Variant kPortable;
#if defined(__x86_64__) && defined(__GNUC__)
#define GRAPHPRUNE_X86 1
extern const Variant kAvx2, kAvx512, kAvx512Bf16;
#endif

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of_bfloat16(uint16_t bits) { return float_of_bits(uint32_t{bits} << 16); }

// Rounds to the nearest, ties to even.
inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_of_float16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // The multiplication by 2^112 moves the exponent, and makes subnormal numbers normal ones.
  const float scaled = float_of_bits(rest << 13) * float_of_bits(uint32_t{127 + 112} << 23);
  return float_of_bits(sign | bits_of_float(scaled));
}

// Rounds to the nearest, ties to even.
inline uint16_t float16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds at the place of their last bit
    const float shifted = float_of_bits(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (uint32_t{112} << 23)) >> 13));
}

inline float read_float(const void* data, int32_t type, int64_t at) {
  if (type == GRAPHPRUNE_FLOAT32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return type == GRAPHPRUNE_BFLOAT16 ? float_of_bfloat16(bits) : float_of_float16(bits);
}

// Stores a sum as element [token, row] of y.
void finish(const Job& job, int64_t token, int64_t row, float sum);

}  // namespace graphprune
#endif
