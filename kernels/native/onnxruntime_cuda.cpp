// The operator on CUDA, on the stream of the session.
//
// The first call looks at the weight and allocates; later ones only launch, so they can be captured
// in a CUDA graph.

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include "cuda_driver.h"
#include "cuda_product.h"
#include "onnxruntime_op.h"

namespace graphprune {
namespace {

using cuda::Error;

bool is_of(const graphprune_bitmap& weight, const Tensor* inputs) {
  return weight.values == inputs[kCompressed].data && weight.bitmask == inputs[kBitmask].data &&
         weight.row_offsets == inputs[kRowOffsets].data;
}

class CudaKernel : public Kernel {
 public:
  CudaKernel(const OrtApi* api, int32_t type) : Kernel(api), type_(type) {}

  // What can be refused when a model is loaded. Its weight is on the device, and looked at later.
  OrtStatus* check(const OrtKernelInfo* info) {
    for (size_t index = kCompressed; index < kInputs; ++index) {
      int constant = 0;
      const OrtValue* value = nullptr;
      OrtStatus* status =
          ort::KernelInfoGetConstantInputTensor::call(api_, info, index, &constant, &value);
      if (status) return status;
      if (!constant) return fail("on CUDA, a weight has to be made of initializers");
    }
    const cuda::Driver* driver = nullptr;
    cuda::Context context = nullptr;
    Error error = cuda::open(&driver);
    if (error.empty()) error = cuda::check_cubins();
    if (error.empty() && !driver->cuCtxGetCurrent(&context) && context) {
      const cuda::Kernels* unused = nullptr;
      error = cuda::load(*driver, type_, &unused);
    }
    return error.empty() ? nullptr : fail(error);
  }

  OrtStatus* compute(OrtKernelContext* context) override {
    Tensor inputs[kInputs];
    for (size_t index = 0; index < kInputs; ++index) {
      const OrtValue* value = nullptr;
      OrtStatus* status = ort::KernelContextGetInput::call(api_, context, index, &value);
      if (!status) status = inputs[index].read(api_, value);
      if (status) return status;
    }
    void* stream = nullptr;
    OrtStatus* status = ort::KernelContextGetGpuComputeStream::call(api_, context, &stream);
    if (!status && !ready_.load(std::memory_order_acquire)) {
      status = prepare(inputs, static_cast<cuda::Stream>(stream));
    }
    if (status) return status;
    if (!is_of(product_->weight(), inputs)) return fail("the weight isn't that of the first call");
    Tensor& x = inputs[kX];
    const int64_t columns = product_->weight().columns;
    if (x.dimensions == 0 || x.sizes[x.dimensions - 1] != columns) {
      return fail("the last dimension of x isn't the " + std::to_string(columns) +
                  " columns of the weight");
    }
    int64_t tokens = 1;
    for (size_t d = 0; d + 1 < x.dimensions; ++d) tokens *= x.sizes[d];
    x.sizes[x.dimensions - 1] = product_->weight().rows;
    OrtValue* output = nullptr;
    status = ort::KernelContextGetOutput::call(api_, context, 0, x.sizes, x.dimensions, &output);
    void* y = nullptr;
    if (!status) status = ort::GetTensorMutableData::call(api_, output, &y);
    if (status) return status;
    count_call();
    const Error error = product_->launch(tokens, x.data, y, static_cast<cuda::Stream>(stream));
    return error.empty() ? nullptr : fail(error);
  }

 private:
  OrtStatus* fail(const Error& why) const {
    return ort::CreateStatus::call(api_, ort::kFail, ("graphprune.BitmapLinear: " + why).c_str());
  }

  // Sessions run on several threads at a time.
  OrtStatus* prepare(const Tensor* inputs, cuda::Stream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ready_.load(std::memory_order_relaxed)) return nullptr;
    const Tensor& shape = inputs[kShape];
    if (shape.dimensions != 1 || shape.sizes[0] != 2) {
      return fail("shape isn't the two sizes of a matrix");
    }
    const int64_t* sizes = static_cast<const int64_t*>(shape.data);
    graphprune_bitmap weight;
    OrtStatus* status = read_weight(api_, inputs, type_, sizes[0], sizes[1], &weight);
    if (status) return status;
    Error error;
    try {
      product_ = std::make_unique<CudaProduct>();
      error = product_->prepare(weight, stream);
    } catch (const std::exception& e) {
      error = e.what();
    }
    if (!error.empty()) return fail(error);
    ready_.store(true, std::memory_order_release);
    return nullptr;
  }

  int32_t type_;
  std::unique_ptr<CudaProduct> product_;
  std::mutex mutex_;
  std::atomic<bool> ready_{false};
};

}  // namespace

Kernel* create_cuda_kernel(const Kind& kind, const OrtApi* api, const OrtKernelInfo* info,
                           OrtStatus** status) {
  try {
    auto kernel = std::make_unique<CudaKernel>(api, kind.type);
    *status = kernel->check(info);
    return *status ? nullptr : kernel.release();
  } catch (const std::exception& e) {
    *status = failure(api, ort::kFail, "graphprune.BitmapLinear: %s", e.what());
    return nullptr;
  }
}

}  // namespace graphprune
