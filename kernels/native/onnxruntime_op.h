// What the kernels of the ONNX Runtime operator share, whatever they run on.

#ifndef GRAPHPRUNE_ONNXRUNTIME_OP_H
#define GRAPHPRUNE_ONNXRUNTIME_OP_H

#include "bitmap_linear.h"
#include "onnxruntime_abi.h"

namespace graphprune {

// The inputs, in this order. The output is (..., rows), of the type of x.
enum Input { kX, kCompressed, kBitmask, kRowOffsets, kShape, kInputs };

// A kernel of one node.
class Kernel {
 public:
  explicit Kernel(const OrtApi* api) : api_(api) {}
  virtual ~Kernel() = default;
  virtual OrtStatus* compute(OrtKernelContext* context) = 0;

 protected:
  const OrtApi* api_;
};

// A kind of kernel. More than one may serve the same execution provider, for other types.
struct Kind {
  const char* provider;
  int element_type;  // of x, compressed and the output
  int32_t type;      // the same, as a graphprune_type
  // Where the kernel wants the shape to be; the other inputs are on its device.
  int shape_memory;
  // Null, with a status, on failure.
  Kernel* (*create)(const Kind&, const OrtApi*, const OrtKernelInfo*, OrtStatus** status);
};

constexpr size_t kMaxDimensions = 16;

struct Tensor {
  void* data = nullptr;
  size_t dimensions = 0;
  int64_t sizes[kMaxDimensions] = {};

  // Null on success.
  OrtStatus* read(const OrtApi* api, const OrtValue* value);
};

// A status with a text in the manner of printf.
OrtStatus* failure(const OrtApi* api, int code, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Puts the weight together and checks the sizes of its parts, though not their contents.
OrtStatus* read_weight(const OrtApi* api, const Tensor* inputs, int32_t type, int64_t rows,
                       int64_t columns, graphprune_bitmap* weight);

// For `graphprune_onnxruntime_calls`.
void count_call();

Kernel* create_cpu_kernel(const Kind& kind, const OrtApi* api, const OrtKernelInfo* info,
                          OrtStatus** status);
Kernel* create_cuda_kernel(const Kind& kind, const OrtApi* api, const OrtKernelInfo* info,
                           OrtStatus** status);

}  // namespace graphprune
#endif
