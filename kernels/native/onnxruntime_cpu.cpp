// The operator on the CPU.

#include <new>

#include "onnxruntime_op.h"
#include "product.h"

namespace graphprune {
namespace {

// ONNX Runtime tells nobody how many threads it has; parts beyond them cost next to nothing.
constexpr int64_t kMostParts = 64;

class CpuKernel : public Kernel {
 public:
  CpuKernel(const OrtApi* api, int32_t type) : Kernel(api), type_(type) {}

  // Checks a weight that is an initialiser now, so that a bad file is refused when it is loaded
  // and a call needs no more than a look at the addresses.
  OrtStatus* verify_constants(const OrtKernelInfo* info) {
    Tensor inputs[kInputs];
    for (size_t index = kCompressed; index < kInputs; ++index) {
      int constant = 0;
      const OrtValue* value = nullptr;
      OrtStatus* status =
          ort::KernelInfoGetConstantInputTensor::call(api_, info, index, &constant, &value);
      if (status) return status;
      if (!constant || !value) return nullptr;
      status = inputs[index].read(api_, value);
      if (status) return status;
    }
    graphprune_bitmap weight;
    OrtStatus* status = verified(inputs, &weight);
    if (!status) constant_ = weight;
    return status;
  }

  OrtStatus* compute(OrtKernelContext* context) override {
    Tensor inputs[kInputs];
    for (size_t index = 0; index < kInputs; ++index) {
      const OrtValue* value = nullptr;
      OrtStatus* status = ort::KernelContextGetInput::call(api_, context, index, &value);
      if (!status) status = inputs[index].read(api_, value);
      if (status) return status;
    }
    graphprune_bitmap weight;
    OrtStatus* status = same_as_constant(inputs) ? nullptr : verified(inputs, &weight);
    if (status) return status;
    if (same_as_constant(inputs)) weight = constant_;
    Tensor& x = inputs[kX];
    if (x.dimensions == 0 || x.sizes[x.dimensions - 1] != weight.columns) {
      return failure(api_, ort::kInvalidArgument,
                     "graphprune.BitmapLinear: the last dimension of x isn't the %lld columns of "
                     "the weight",
                     static_cast<long long>(weight.columns));
    }
    int64_t tokens = 1;
    for (size_t d = 0; d + 1 < x.dimensions; ++d) tokens *= x.sizes[d];
    x.sizes[x.dimensions - 1] = weight.rows;
    OrtValue* output = nullptr;
    status =
        ort::KernelContextGetOutput::call(api_, context, 0, x.sizes, x.dimensions, &output);
    if (status) return status;
    void* y = nullptr;
    status = ort::GetTensorMutableData::call(api_, output, &y);
    return status ? status : multiply(context, weight, tokens, x.data, y);
  }

 private:
  bool same_as_constant(const Tensor* inputs) const {
    return constant_.bitmask && constant_.bitmask == inputs[kBitmask].data &&
           constant_.row_offsets == inputs[kRowOffsets].data &&
           constant_.values == inputs[kCompressed].data &&
           constant_.nonzeros == inputs[kCompressed].sizes[0];
  }

  OrtStatus* verified(const Tensor* inputs, graphprune_bitmap* weight) {
    const Tensor& shape = inputs[kShape];
    if (shape.dimensions != 1 || shape.sizes[0] != 2) {
      return failure(api_, ort::kInvalidArgument,
                     "graphprune.BitmapLinear: shape isn't the two sizes of a matrix");
    }
    const int64_t* sizes = static_cast<const int64_t*>(shape.data);
    OrtStatus* status = read_weight(api_, inputs, type_, sizes[0], sizes[1], weight);
    if (status) return status;
    int64_t row = 0;
    const int bad = graphprune_verify(weight, &row);
    if (!bad) return nullptr;
    return failure(api_, ort::kInvalidArgument, "graphprune.BitmapLinear: %s of row %lld %s",
                   bad == GRAPHPRUNE_BAD_BITMASK ? "the bits" : "row_offsets",
                   static_cast<long long>(row),
                   bad == GRAPHPRUNE_BAD_BITMASK ? "contradict row_offsets"
                                                 : "leave the values or the row");
  }

  OrtStatus* multiply(OrtKernelContext* context, const graphprune_bitmap& weight, int64_t tokens,
                      const void* x, void* y) {
    count_call();
    Product product;
    int status = product.start(weight, type_, tokens, x, nullptr, y);
    if (!status) {
      struct Run {
        Product* product;
        int parts;
      } run{&product, product.parts(kMostParts)};
      const auto work = [](void* argument, size_t part) {
        const Run* all = static_cast<const Run*>(argument);
        all->product->run(static_cast<int>(part), all->parts);
      };
      if (run.parts == 1) {
        work(&run, 0);
      } else {
        OrtStatus* failed = ort::KernelContextParallelFor::call(
            api_, context, work, static_cast<size_t>(run.parts), 0, &run);
        if (failed) return failed;
      }
      status = product.status();
    }
    if (!status) return nullptr;
    return failure(api_, ort::kFail, "graphprune.BitmapLinear: %s",
                   status == GRAPHPRUNE_NO_MEMORY ? "out of memory" : "bad sizes");
  }

  int32_t type_;
  graphprune_bitmap constant_{};  // checked at creation; its bitmask is null if nothing was
};

}  // namespace

Kernel* create_cpu_kernel(const Kind& kind, const OrtApi* api, const OrtKernelInfo* info,
                          OrtStatus** status) {
  CpuKernel* kernel = new (std::nothrow) CpuKernel(api, kind.type);
  *status = kernel ? kernel->verify_constants(info)
                   : failure(api, ort::kFail, "graphprune.BitmapLinear: out of memory");
  if (!*status) return kernel;
  delete kernel;
  return nullptr;
}

}  // namespace graphprune
