// The little of ONNX Runtime's C interface that the operator needs.
//
// ONNX Runtime's wheels lack its header. But its interface is one table of function pointers whose
// order never changes: new functions go to the end. So a function is known by its place, counted
// from 0 in `struct OrtApi` of include/onnxruntime/core/session/onnxruntime_c_api.h; the same
// header declares the structures and numbers below. All stand there since ORT_API_VERSION 18 or
// longer, which is ONNX Runtime 1.18. Later versions serve those who ask for 18.

#ifndef GRAPHPRUNE_ONNXRUNTIME_ABI_H
#define GRAPHPRUNE_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

extern "C" {

// Opaque.
struct OrtStatus;
struct OrtApi;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null if it is newer than the runtime
  const char* (*GetVersionString)();
};

// An operator; a pointer that is null means the default, where there is one.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

namespace graphprune {
namespace ort {

constexpr uint32_t kApiVersion = 18;

enum ElementType { kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum Characteristic { kRequired = 0 };
enum MemoryType { kMemoryCpuInput = -2, kMemoryDefault = 0 };

// A function of the table.
template <int Place, class Result, class... Arguments>
struct Function {
  static Result call(const OrtApi* api, Arguments... arguments) {
    using Pointer = Result (*)(Arguments...);
    void* const* table = reinterpret_cast<void* const*>(api);
    return reinterpret_cast<Pointer>(table[Place])(arguments...);
  }
};
template <int Place, class... Arguments>
using Fallible = Function<Place, OrtStatus*, Arguments...>;

using CreateStatus = Fallible<0, int, const char*>;
using CreateCustomOpDomain = Fallible<26, const char*, OrtCustomOpDomain**>;
using CustomOpDomainAdd = Fallible<27, OrtCustomOpDomain*, const OrtCustomOp*>;
using AddCustomOpDomain = Fallible<28, OrtSessionOptions*, OrtCustomOpDomain*>;
using GetTensorMutableData = Fallible<51, OrtValue*, void**>;
using GetDimensionsCount = Fallible<61, const OrtTensorTypeAndShapeInfo*, size_t*>;
using GetDimensions = Fallible<62, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>;
using GetTensorTypeAndShape = Fallible<65, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using KernelContextGetInput = Fallible<90, const OrtKernelContext*, size_t, const OrtValue**>;
using KernelContextGetOutput =
    Fallible<91, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>;
using ReleaseTensorTypeAndShapeInfo = Function<99, void, OrtTensorTypeAndShapeInfo*>;
// For kernels of the CUDA provider.
using KernelContextGetGpuComputeStream = Fallible<193, const OrtKernelContext*, void**>;
using KernelInfoGetConstantInputTensor =
    Fallible<249, const OrtKernelInfo*, size_t, int*, const OrtValue**>;
using KernelContextParallelFor = Fallible<274, const OrtKernelContext*, void (*)(void*, size_t),
                                          size_t, size_t, void*>;

}  // namespace ort
}  // namespace graphprune
#endif
