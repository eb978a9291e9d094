// The operator graphprune::BitmapLinear (version 1) of ONNX Runtime, and its registration.

#include "onnxruntime_op.h"

#include <stdarg.h>
#include <stdio.h>

#include <atomic>
#include <mutex>

namespace graphprune {
namespace {

std::atomic<int64_t> calls{0};

// A provider that a runtime doesn't have is ignored there.
const Kind kKinds[] = {
    {"CPUExecutionProvider", ort::kFloat, GRAPHPRUNE_FLOAT32, ort::kMemoryDefault,
     create_cpu_kernel},
    {"CPUExecutionProvider", ort::kFloat16, GRAPHPRUNE_FLOAT16, ort::kMemoryDefault,
     create_cpu_kernel},
    {"CPUExecutionProvider", ort::kBfloat16, GRAPHPRUNE_BFLOAT16, ort::kMemoryDefault,
     create_cpu_kernel},
    {"CUDAExecutionProvider", ort::kFloat, GRAPHPRUNE_FLOAT32, ort::kMemoryCpuInput,
     create_cuda_kernel},
    {"CUDAExecutionProvider", ort::kFloat16, GRAPHPRUNE_FLOAT16, ort::kMemoryCpuInput,
     create_cuda_kernel},
    {"CUDAExecutionProvider", ort::kBfloat16, GRAPHPRUNE_BFLOAT16, ort::kMemoryCpuInput,
     create_cuda_kernel},
};
constexpr size_t kCount = sizeof kKinds / sizeof *kKinds;

struct Operator : OrtCustomOp {
  const Kind* kind;
};

const Kind& kind_of(const OrtCustomOp* op) { return *static_cast<const Operator*>(op)->kind; }

Operator operator_of(const Kind& kind) {
  Operator op{};
  op.kind = &kind;
  op.version = ort::kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "BitmapLinear"; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) { return kind_of(self).provider; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) -> int {
    if (index == kBitmask) return ort::kUint8;
    return index == kRowOffsets || index == kShape ? ort::kInt64 : kind_of(self).element_type;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return kind_of(self).element_type; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp* self, size_t index) -> int {
    return index == kShape ? kind_of(self).shape_memory : ort::kMemoryDefault;
  };
  const auto one = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = one;
  op.GetStartVersion = op.GetEndVersion = one;
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info,
                         void** kernel) {
    OrtStatus* status = nullptr;
    *kernel = kind_of(self).create(kind_of(self), api, info, &status);
    return status;
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<Kernel*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

// One domain serves all sessions of the process. It lives as long as the library.
OrtStatus* shared_domain(const OrtApi* api, OrtCustomOpDomain** domain) {
  static std::mutex mutex;
  static OrtCustomOpDomain* made = nullptr;
  static Operator operators[kCount];
  std::lock_guard<std::mutex> lock(mutex);
  if (!made) {
    OrtCustomOpDomain* fresh = nullptr;
    OrtStatus* status = ort::CreateCustomOpDomain::call(api, "graphprune", &fresh);
    for (size_t at = 0; !status && at < kCount; ++at) {
      operators[at] = operator_of(kKinds[at]);
      status = ort::CustomOpDomainAdd::call(api, fresh, &operators[at]);
    }
    if (status) return status;
    made = fresh;
  }
  *domain = made;
  return nullptr;
}

}  // namespace

void count_call() { calls.fetch_add(1, std::memory_order_relaxed); }

OrtStatus* failure(const OrtApi* api, int code, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return ort::CreateStatus::call(api, code, text);
}

OrtStatus* Tensor::read(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  OrtStatus* status = ort::GetTensorTypeAndShape::call(api, value, &info);
  if (status) return status;
  status = ort::GetDimensionsCount::call(api, info, &dimensions);
  if (!status && dimensions > kMaxDimensions) {
    status = failure(api, ort::kInvalidArgument,
                     "graphprune.BitmapLinear: an input has %zu dimensions", dimensions);
  }
  if (!status) status = ort::GetDimensions::call(api, info, sizes, dimensions);
  ort::ReleaseTensorTypeAndShapeInfo::call(api, info);
  if (status) return status;
  // Only its inputs are read, but there is one function for both.
  return ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &data);
}

OrtStatus* read_weight(const OrtApi* api, const Tensor* inputs, int32_t type, int64_t rows,
                       int64_t columns, graphprune_bitmap* weight) {
  const Tensor &values = inputs[kCompressed], &bits = inputs[kBitmask],
               &offsets = inputs[kRowOffsets];
  const char* wrong = nullptr;
  if (rows < 1 || columns < 1 || columns > INT64_MAX - 7) wrong = "shape";
  else if (values.dimensions != 1) wrong = "the size of compressed";
  else if (offsets.dimensions != 1 || offsets.sizes[0] != rows) wrong = "the size of row_offsets";
  else if (bits.dimensions != 2 || bits.sizes[0] != rows || bits.sizes[1] != (columns + 7) / 8)
    wrong = "the size of bitmask";
  if (wrong) {
    return failure(api, ort::kInvalidArgument,
                   "graphprune.BitmapLinear: %s doesn't suit a weight of %lld x %lld", wrong,
                   static_cast<long long>(rows), static_cast<long long>(columns));
  }
  *weight = {rows, columns, values.sizes[0], values.data, type,
             static_cast<const uint8_t*>(bits.data), static_cast<const int64_t*>(offsets.data)};
  return nullptr;
}

}  // namespace graphprune

int64_t graphprune_onnxruntime_calls(void) { return graphprune::calls.load(); }

// Called by ONNX Runtime's register_custom_ops_library.
extern "C" GRAPHPRUNE_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                       const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(graphprune::ort::kApiVersion);
  if (!api) {
    // Creating a status is the first function of every version.
    return graphprune::failure(base->GetApi(1), graphprune::ort::kFail,
                               "graphprune needs ONNX Runtime 1.18 or newer, not %s",
                               base->GetVersionString());
  }
  OrtCustomOpDomain* domain = nullptr;
  OrtStatus* status = graphprune::shared_domain(api, &domain);
  return status ? status : graphprune::ort::AddCustomOpDomain::call(api, options, domain);
}
