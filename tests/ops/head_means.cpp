// The operator mylib::HeadMeans of docs/adding-an-operator.md for ONNX Runtime on the CPU: means
// over equal parts of the last dimension, as many as the attribute `heads` says.

#include <vector>

#include "onnxruntime_abi.h"

namespace {

using namespace graphprune::ort;
using KernelInfoGetInteger = Fallible<86, const OrtKernelInfo*, const char*, int64_t*>;

struct Kernel {
  const OrtApi* api;
  int64_t heads;

  OrtStatus* compute(OrtKernelContext* context) const {
    const OrtValue* x = nullptr;
    OrtStatus* status = KernelContextGetInput::call(api, context, 0, &x);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (!status) status = GetTensorTypeAndShape::call(api, x, &info);
    if (status) return status;
    size_t rank = 0;
    status = GetDimensionsCount::call(api, info, &rank);
    std::vector<int64_t> shape(rank);
    if (!status) status = GetDimensions::call(api, info, shape.data(), rank);
    ReleaseTensorTypeAndShapeInfo::call(api, info);
    if (status) return status;
    if (!rank || heads < 1 || shape.back() % heads) {
      return CreateStatus::call(api, kInvalidArgument, "HeadMeans: the heads aren't equal");
    }
    const int64_t width = shape.back() / heads;
    shape.back() = heads;
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    OrtValue* y = nullptr;
    status = KernelContextGetOutput::call(api, context, 0, shape.data(), rank, &y);
    void *from = nullptr, *to = nullptr;
    if (!status) status = GetTensorMutableData::call(api, const_cast<OrtValue*>(x), &from);
    if (!status) status = GetTensorMutableData::call(api, y, &to);
    for (int64_t i = 0; !status && i < count; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < width; ++j) sum += static_cast<float*>(from)[i * width + j];
      static_cast<float*>(to)[i] = static_cast<float>(sum / static_cast<double>(width));
    }
    return status;
  }
};

OrtCustomOp head_means() {
  OrtCustomOp op{};
  const auto one = [](const OrtCustomOp*) { return 1; };
  const auto single = [](const OrtCustomOp*) -> size_t { return 1; };
  const auto floats = [](const OrtCustomOp*, size_t) -> int { return kFloat; };
  const auto required = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "HeadMeans"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = op.GetOutputTypeCount = single;
  op.GetInputType = op.GetOutputType = floats;
  op.GetInputCharacteristic = op.GetOutputCharacteristic = required;
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int { return kMemoryDefault; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = one;
  op.GetStartVersion = op.GetEndVersion = one;
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                         void** kernel) {
    int64_t heads = 0;
    OrtStatus* status = KernelInfoGetInteger::call(api, info, "heads", &heads);
    if (!status) *kernel = new Kernel{api, heads};
    return status;
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<Kernel*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static const OrtCustomOp op = head_means();
  const OrtApi* api = base->GetApi(kApiVersion);
  static OrtCustomOpDomain* domain = nullptr;
  if (!domain) {
    OrtStatus* status = CreateCustomOpDomain::call(api, "mylib", &domain);
    if (!status) status = CustomOpDomainAdd::call(api, domain, &op);
    if (status) return status;
  }
  return AddCustomOpDomain::call(api, options, domain);
}
