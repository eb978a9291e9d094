// The algorithm that all vector instruction sets share.
//
// A file that includes this defines GRAPHPRUNE_TARGET, the attribute that turns its instructions
// on, and a class T of "traits" for each combination of types:
//
//     Value, Input          of the weight and of x, as stored
//     Lanes, Sums           vectors of weights or of x, and of float32 sums
//     kLanes                numbers in a Lanes
//     rows_for(tokens)      rows to do at once, a divisor of kBlock; kDecodedRows for decoded ones
//     expand(bits, values)  values at the places of set bits; reads kLanes of them
//     load, store, zero, multiply_add, add, total

#ifndef GRAPHPRUNE_ROWS_SIMD_H
#define GRAPHPRUNE_ROWS_SIMD_H

#include <immintrin.h>
#include <stdlib.h>

#include "job.h"

#define GRAPHPRUNE_INLINE static inline __attribute__((always_inline)) GRAPHPRUNE_TARGET

namespace graphprune {
namespace {

constexpr int kAhead = 2048;  // bytes of values to prefetch: measured
constexpr int kTokens = 8;    // that one pass over a row serves; more share decoded rows

// Where the values of a row are, which may be read kLanes past their end, and its bits.
template <class T>
struct Row {
  const typename T::Value* values;
  const uint8_t* bits;
};

GRAPHPRUNE_INLINE uint64_t load_bits(const uint8_t* bytes, int64_t count) {
  uint64_t bits = 0;
  memcpy(&bits, bytes, static_cast<size_t>(count));
  return bits;
}

// The weights of step `step` of a group. Counting from the group's start keeps the steps
// independent of each other.
template <class T>
GRAPHPRUNE_INLINE typename T::Lanes expand(uint64_t bits, const typename T::Value* values,
                                           int step) {
  const uint64_t before = bits & ((uint64_t{1} << (step * T::kLanes)) - 1);
  const typename T::Value* from = values + __builtin_popcountll(before);
  _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
  return T::expand(bits >> (step * T::kLanes), from);
}

// Adds kGroup columns of R rows to the sums of N tokens; S sums of a token take turns, to hide the
// latency of an addition.
template <class T, int R, int N, int S>
GRAPHPRUNE_INLINE void add_group(const uint64_t (&bits)[R], const typename T::Value* (&values)[R],
                                 const typename T::Input* x, int64_t stride,
                                 typename T::Sums (&sums)[R][N][S]) {
#pragma GCC unroll 8
  for (int step = 0; step < kGroup / T::kLanes; ++step) {
    typename T::Lanes tokens[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) tokens[n] = T::load(x + n * stride + step * T::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename T::Lanes weights = expand<T>(bits[r], values[r], step);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        sums[r][n][step % S] = T::multiply_add(sums[r][n][step % S], weights, tokens[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) values[r] += __builtin_popcountll(bits[r]);
}

template <class T, int S>
GRAPHPRUNE_INLINE float total(typename T::Sums (&sums)[S]) {
  for (int width = S / 2; width; width /= 2) {
    for (int s = 0; s < width; ++s) sums[s] = T::add(sums[s], sums[s + width]);
  }
  return T::total(sums[0]);
}

// R rows times N tokens, with nothing kept of the weights.
template <class T, int R, int N>
GRAPHPRUNE_TARGET void multiply(const Job& job, const Row<T>* rows, int64_t place) {
  constexpr int S = N <= 2 ? 4 : 1;
  typename T::Sums sums[R][N][S];
  const typename T::Value* values[R];
  uint64_t bits[R];
  for (int r = 0; r < R; ++r) {
    values[r] = rows[r].values;
    for (int n = 0; n < N; ++n) {
      for (int s = 0; s < S; ++s) sums[r][n][s] = T::zero();
    }
  }
  const typename T::Input* x = static_cast<const typename T::Input*>(job.x);
  const int64_t full = job.row_bytes / 8 * 8;
  for (int64_t byte = 0; byte < full; byte += 8) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) bits[r] = load_bits(rows[r].bits + byte, 8);
    add_group<T, R, N, S>(bits, values, x + 8 * byte, job.stride, sums);
  }
  if (full < job.row_bytes) {
    for (int r = 0; r < R; ++r) bits[r] = load_bits(rows[r].bits + full, job.row_bytes - full);
    add_group<T, R, N, S>(bits, values, x + 8 * full, job.stride, sums);
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) finish(job, n, place + r, total<T, S>(sums[r][n]));
  }
}

// All rows of a block times N tokens.
template <class T, int N>
void block(const Job& job, const Row<T>* rows, int count, int64_t place) {
  constexpr int R = T::rows_for(N);
  int r = 0;
  for (; r + R <= count; r += R) multiply<T, R, N>(job, rows + r, place + r);
  for (; r < count; ++r) multiply<T, 1, N>(job, rows + r, place + r);
}

template <class T>
GRAPHPRUNE_INLINE void decode_group(uint64_t bits, const typename T::Value*& values,
                                    typename T::Input* to) {
#pragma GCC unroll 8
  for (int step = 0; step < kGroup / T::kLanes; ++step) {
    T::store(to + step * T::kLanes, expand<T>(bits, values, step));
  }
  values += __builtin_popcountll(bits);
}

// Writes a dense row of `stride` numbers.
template <class T>
GRAPHPRUNE_TARGET void decode(const Job& job, const Row<T>& row, typename T::Input* to) {
  const typename T::Value* values = row.values;
  const int64_t full = job.row_bytes / 8 * 8;
  for (int64_t byte = 0; byte < full; byte += 8) {
    decode_group<T>(load_bits(row.bits + byte, 8), values, to + 8 * byte);
  }
  if (full < job.row_bytes) {
    decode_group<T>(load_bits(row.bits + full, job.row_bytes - full), values, to + 8 * full);
  }
}

// R decoded rows times N tokens.
template <class T, int R, int N>
GRAPHPRUNE_TARGET void multiply_decoded(const Job& job, const typename T::Input* weights,
                                        int64_t row, int64_t token) {
  typename T::Sums sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = T::zero();
  }
  const typename T::Input* x = static_cast<const typename T::Input*>(job.x) + token * job.stride;
  for (int64_t column = 0; column < job.stride; column += T::kLanes) {
    typename T::Lanes tokens[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) tokens[n] = T::load(x + n * job.stride + column);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename T::Lanes part = T::load(weights + r * job.stride + column);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = T::multiply_add(sums[r][n], part, tokens[n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) finish(job, token + n, row + r, T::total(sums[r][n]));
  }
}

template <class T, int N>
void block_decoded(const Job& job, const typename T::Input* weights, int count, int64_t row,
                   int64_t token) {
  constexpr int R = T::kDecodedRows;
  int r = 0;
  for (; r + R <= count; r += R) {
    multiply_decoded<T, R, N>(job, weights + r * job.stride, row + r, token);
  }
  for (; r < count; ++r) {
    multiply_decoded<T, 1, N>(job, weights + r * job.stride, row + r, token);
  }
}

template <class T>
using Direct = void (*)(const Job&, const Row<T>*, int, int64_t);
template <class T>
using Decoded = void (*)(const Job&, const typename T::Input*, int, int64_t, int64_t);

// See `Rows` in job.h.
template <class T>
bool multiply_rows(const Job& job, int64_t begin, int64_t end) {
  static constexpr Direct<T> direct[kTokens] = {block<T, 1>, block<T, 2>, block<T, 3>, block<T, 4>,
                                                block<T, 5>, block<T, 6>, block<T, 7>, block<T, 8>};
  static constexpr Decoded<T> decoded[] = {block_decoded<T, 1>, block_decoded<T, 2>,
                                           block_decoded<T, 3>, block_decoded<T, 4>};
  using Value = typename T::Value;
  using Input = typename T::Input;
  const Value* values = static_cast<const Value*>(job.weight.values);
  const bool keep = job.tokens > kTokens;
  const size_t weights_bytes = keep ? kBlock * static_cast<size_t>(job.stride) * sizeof(Input) : 0;
  const size_t spare = static_cast<size_t>(job.stride) + T::kLanes;  // values of a row and more
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, weights_bytes + kBlock * spare * sizeof(Value))) return false;
  Input* weights = static_cast<Input*>(memory);
  Value* spares = reinterpret_cast<Value*>(static_cast<char*>(memory) + weights_bytes);

  for (int64_t row = begin; row < end; row += kBlock) {
    const int count = static_cast<int>(end - row < kBlock ? end - row : kBlock);
    Row<T> rows[kBlock];
    for (int r = 0; r < count; ++r) {
      const int64_t first = job.row_begin(row + r), last = job.row_end(row + r);
      rows[r] = {values + first, job.weight.bitmask + (row + r) * job.row_bytes};
      if (last + T::kLanes > job.weight.nonzeros) {
        // Whole vectors are read, and the last rows lack the memory for that behind them.
        Value* copy = spares + static_cast<size_t>(r) * spare;
        const size_t bytes = static_cast<size_t>(last - first) * sizeof(Value);
        if (bytes) memcpy(copy, values + first, bytes);
        rows[r].values = copy;
      }
    }
    if (!keep) {
      direct[job.tokens - 1](job, rows, count, row);
      continue;
    }
    for (int r = 0; r < count; ++r) decode<T>(job, rows[r], weights + r * job.stride);
    for (int64_t token = 0; token < job.tokens; token += 4) {
      const int64_t left = job.tokens - token;
      decoded[left < 4 ? left - 1 : 3](job, weights, count, row, token);
    }
  }
  free(memory);
  return true;
}

}  // namespace
}  // namespace graphprune
#endif
