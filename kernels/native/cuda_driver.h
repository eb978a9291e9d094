// CUDA's driver, opened when it is needed, and the cubins that stand beside the library.
//
// Neither CUDA's headers nor its libraries are needed to build: the driver's interface is stable,
// and libcuda.so.1 comes with every driver. kernels/gpu/prebuilt.py writes the cubins.

#ifndef GRAPHPRUNE_CUDA_DRIVER_H
#define GRAPHPRUNE_CUDA_DRIVER_H

#include <stdint.h>

#include <string>
#include <vector>

#include "bitmap_linear.h"

extern "C" {

// Opaque, as in cuda.h.
struct CUctx_st;
struct CUstream_st;
struct CUmod_st;
struct CUfunc_st;

// For tests: uses another driver and other cubins; null for the usual ones. What was prepared
// before must be gone.
GRAPHPRUNE_API void graphprune_cuda_paths(const char* driver, const char* cubins);
}

namespace graphprune {
namespace cuda {

// Why something failed; empty if it didn't.
using Error = std::string;

using Context = CUctx_st*;
using Stream = CUstream_st*;
using Module = CUmod_st*;
using Function = CUfunc_st*;
using Address = unsigned long long;

// Numbers of cuda.h.
enum Attribute { kCapabilityMajor = 75, kCapabilityMinor = 76, kMostShared = 97 };
constexpr int kFunctionDynamicShared = 8;

// Functions by their names in the library, which carry versions.
struct Driver {
  int (*cuInit)(unsigned);
  int (*cuGetErrorName)(int, const char**);
  int (*cuCtxGetCurrent)(Context*);
  int (*cuCtxGetDevice)(int*);
  int (*cuCtxPushCurrent_v2)(Context);
  int (*cuCtxPopCurrent_v2)(Context*);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuModuleLoadData)(Module*, const void*);
  int (*cuModuleUnload)(Module);
  int (*cuModuleGetFunction)(Function*, Module, const char*);
  int (*cuFuncSetAttribute)(Function, int, int);
  int (*cuMemAlloc_v2)(Address*, size_t);
  int (*cuMemFree_v2)(Address);
  int (*cuMemcpyHtoD_v2)(Address, const void*, size_t);
  int (*cuMemcpyDtoH_v2)(void*, Address, size_t);
  int (*cuStreamSynchronize)(Stream);
  int (*cuStreamIsCapturing)(Stream, int*);
  int (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, Stream, void**, void**);
  int (*cuFuncLoad)(Function);  // null in drivers before CUDA 12.4

  // Empty for a status of 0, else what failed and how.
  Error check(int status, const char* what) const;
};

// Opens it if it isn't open. The driver lives as long as the process.
Error open(const Driver** driver);

// What a kernel takes; its order is the manifest's.
enum Parameter { kX, kWords, kOffsets, kBefore, kValues, kY, kTokens, kRows, kColumns, kStride };
constexpr int kParameters = 10, kMostExtra = 6;

// A line of the manifest; see `Variant` of kernels/gpu/prebuilt.py.
struct Cubin {
  std::string file, architecture, entry;
  int32_t type = 0;  // a graphprune_type
  int tokens = 0, rows = 0, warps = 0, shared = 0, multiple = 0, extra = 0;

  bool runs_on(int major, int minor) const;
};

// A kernel that can be launched.
struct Loaded {
  Cubin cubin;
  Function function;
};

// The kernels of one type for one context, by ascending tokens; for equal ones, the larger multiple
// comes first. They live as long as the process.
struct Kernels {
  int order[kParameters];
  std::vector<Loaded> loaded;
};

// Reads the manifest, once.
Error check_cubins();

// Loads them if they aren't yet. A context must be current.
Error load(const Driver& driver, int32_t type, const Kernels** kernels);

}  // namespace cuda
}  // namespace graphprune
#endif
