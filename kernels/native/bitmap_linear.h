// Products of tokens with a weight in the format `bitmap` (kernels/formats/bitmap.py), on the CPU.
//
//     y[t, n] = bias[n] + sum over k of x[t, k] * W[n, k]
//
// A plain C interface: no exception leaves it, and every function may be called from any thread.

#ifndef GRAPHPRUNE_BITMAP_LINEAR_H
#define GRAPHPRUNE_BITMAP_LINEAR_H

#include <stdint.h>

#if defined(_WIN32)
#define GRAPHPRUNE_API __declspec(dllexport)
#else
#define GRAPHPRUNE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised when a function changes its meaning, so that a library left from another build is refused.
#define GRAPHPRUNE_NATIVE_VERSION 1

enum graphprune_type {
  GRAPHPRUNE_FLOAT32 = 0,
  GRAPHPRUNE_BFLOAT16 = 1,
  GRAPHPRUNE_FLOAT16 = 2,
};

enum graphprune_status {
  GRAPHPRUNE_OK = 0,
  GRAPHPRUNE_BAD_ARGUMENT = 1,  // a negative size, a null pointer or an unknown type
  GRAPHPRUNE_BAD_OFFSETS = 2,   // row_offsets leave the values or make a row too long
  GRAPHPRUNE_BAD_BITMASK = 3,   // its bits contradict row_offsets, or lie after the last column
  GRAPHPRUNE_NO_MEMORY = 4,
  GRAPHPRUNE_UNSUPPORTED = 5,  // the variant asked for isn't in this library or CPU
};

// A weight: `rows` x `columns`, of which `nonzeros` values are there.
typedef struct graphprune_bitmap {
  int64_t rows, columns, nonzeros;
  const void* values;  // [nonzeros], row-major
  int32_t value_type;
  const uint8_t* bitmask;      // [rows, ceil(columns / 8)], the least significant bit first
  const int64_t* row_offsets;  // [rows], where the values of a row begin
} graphprune_bitmap;

// GRAPHPRUNE_NATIVE_VERSION of the library.
GRAPHPRUNE_API int32_t graphprune_native_version(void);

// Multiplies; sums are kept in float32 and rounded once. Doesn't depend on `threads`.
//
// row_offsets are checked; that the bitmask fits them is the caller's word (graphprune_verify).
// x is [tokens, columns], y is [tokens, rows], and bias is [rows] or null; all of io_type.
GRAPHPRUNE_API int graphprune_bitmap_linear(const graphprune_bitmap* weight, int32_t io_type,
                                            int64_t tokens, const void* x, const void* bias,
                                            void* y, int32_t threads);

// Checks every bit and offset; `row` receives the first row that is wrong.
GRAPHPRUNE_API int graphprune_verify(const graphprune_bitmap* weight, int64_t* row);

// Name of the code in use: avx512_bf16, avx512, avx2 or portable.
GRAPHPRUNE_API const char* graphprune_variant(void);

// Uses another one, for tests; null for the best that the CPU has.
GRAPHPRUNE_API int graphprune_force_variant(const char* name);

// How often ONNX Runtime has run the operator, for tests.
GRAPHPRUNE_API int64_t graphprune_onnxruntime_calls(void);

#ifdef __cplusplus
}
#endif
#endif
