// Plain C++, for any processor.

#include "job.h"

namespace graphprune {
namespace {

inline float widened(float value) { return value; }

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
inline float widened(Bfloat16 value) { return float_of_bfloat16(value.bits); }
inline float widened(Float16 value) { return float_of_float16(value.bits); }

constexpr int64_t kTokens = 4;

// A row times up to kTokens tokens.
template <class Value>
void multiply(const Job& job, int64_t row, int64_t token, int64_t tokens) {
  const uint8_t* bits = job.weight.bitmask + row * job.row_bytes;
  const Value* values = static_cast<const Value*>(job.weight.values) + job.row_begin(row);
  const float* x = static_cast<const float*>(job.x) + token * job.stride;
  float sums[kTokens] = {};
  for (int64_t byte = 0; byte < job.row_bytes; ++byte) {
    for (unsigned left = bits[byte], lane = 0; left; left >>= 1, ++lane) {
      if (!(left & 1u)) continue;
      const float value = widened(*values++);
      const float* column = x + 8 * byte + lane;
      for (int64_t t = 0; t < tokens; ++t) sums[t] += value * column[t * job.stride];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) finish(job, token + t, row, sums[t]);
}

template <class Value>
bool multiply_rows(const Job& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t token = 0; token < job.tokens; token += kTokens) {
      const int64_t left = job.tokens - token;
      multiply<Value>(job, row, token, left < kTokens ? left : kTokens);
    }
  }
  return true;
}

bool supported() { return true; }

}  // namespace

const Variant kPortable = {"portable",
                           supported,
                           {multiply_rows<float>, multiply_rows<Bfloat16>, multiply_rows<Float16>},
                           nullptr};

}  // namespace graphprune
