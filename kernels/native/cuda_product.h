// Products with a weight on a GPU. Nothing here knows of ONNX Runtime.

#ifndef GRAPHPRUNE_CUDA_PRODUCT_H
#define GRAPHPRUNE_CUDA_PRODUCT_H

#include "bitmap_linear.h"
#include "cuda_driver.h"

extern "C" {

// The CUDA operator without ONNX Runtime, for tests. A function that returns an int returns 0, or 1
// and why.
// The weight is on the current device, and has to stay.
GRAPHPRUNE_API int graphprune_cuda_prepare(const graphprune_bitmap* weight, void* stream,
                                           void** made, char* why, uint64_t size);
GRAPHPRUNE_API int graphprune_cuda_launch(void* made, int64_t tokens, const void* x, void* y,
                                          void* stream, char* why, uint64_t size);
GRAPHPRUNE_API void graphprune_cuda_release(void* made);
}

namespace graphprune {

// Products with one weight on one device.
class CudaProduct {
 public:
  CudaProduct() = default;
  CudaProduct(const CudaProduct&) = delete;
  CudaProduct& operator=(const CudaProduct&) = delete;
  ~CudaProduct();

  // Checks a weight whose parts are on the current device, and waits for that. They have to stay.
  cuda::Error prepare(const graphprune_bitmap& weight, cuda::Stream stream);

  // Of a weight that is prepared. Neither allocates nor waits, so a CUDA graph can capture it.
  cuda::Error launch(int64_t tokens, const void* x, void* y, cuda::Stream stream) const;

  const graphprune_bitmap& weight() const { return weight_; }

 private:
  cuda::Error prepare_masks();
  const cuda::Loaded* choose(int64_t tokens, const void* x, const void* y) const;
  int launch_part(const cuda::Loaded& kernel, int64_t part, const void* x, void* y,
                  cuda::Stream stream) const;

  const cuda::Driver* driver_ = nullptr;
  const cuda::Kernels* kernels_ = nullptr;
  graphprune_bitmap weight_{};
  cuda::Context context_ = nullptr;
  cuda::Address scratch_ = 0, words_ = 0;
};

}  // namespace graphprune
#endif
