// Products with a weight on a GPU: prebuilt kernels of Triton, launched on the caller's stream.

#include "cuda_product.h"

#include <string.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <memory>
#include <vector>

namespace graphprune {
namespace {

using cuda::Error;

constexpr size_t kBlockBytes = 8;       // of the bitmask: the 64 columns of a block
constexpr int64_t kMostBlocks = 65535;  // of a grid, in the direction of tokens
constexpr size_t kMaskAlignment = 256;
constexpr int kWarp = 32;

int64_t bytes_of(int32_t type) { return type == GRAPHPRUNE_FLOAT32 ? 4 : 2; }

cuda::Address address(const void* pointer) { return reinterpret_cast<cuda::Address>(pointer); }

int report(const Error& error, char* why, uint64_t size) {
  if (size) why[error.copy(why, size - 1)] = 0;
  return error.empty() ? 0 : 1;
}

}  // namespace

CudaProduct::~CudaProduct() {
  // The session may be destroyed where another context is current, or none.
  if (!scratch_ || driver_->cuCtxPushCurrent_v2(context_)) return;
  driver_->cuMemFree_v2(scratch_);
  driver_->cuCtxPopCurrent_v2(&context_);
}

Error CudaProduct::prepare(const graphprune_bitmap& weight, cuda::Stream stream) {
  // The kernel's numbers have 32 bits, and blocks may end behind the last row and column.
  if (weight.rows < 1 || weight.columns < 1 || weight.rows > INT32_MAX - 1024 ||
      weight.columns > INT32_MAX - 1024) {
    return "the weight is empty or has too many rows or columns";
  }
  Error error = cuda::open(&driver_);
  if (error.empty()) error = cuda::load(*driver_, weight.value_type, &kernels_);
  int capturing = 0;
  if (error.empty()) {
    error = driver_->check(driver_->cuStreamIsCapturing(stream, &capturing), "the stream");
  }
  if (!error.empty()) return error;
  if (capturing) return "the first call can't be captured in a CUDA graph; run it once before";
  weight_ = weight;
  return prepare_masks();
}

Error CudaProduct::launch(int64_t tokens, const void* x, void* y, cuda::Stream stream) const {
  const int64_t in = weight_.columns * bytes_of(weight_.value_type);
  const int64_t out = weight_.rows * bytes_of(weight_.value_type);
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(y);
  while (tokens > 0) {
    const cuda::Loaded* kernel = choose(tokens, from, to);
    if (!kernel) return "no kernel takes these addresses";
    const int64_t part = std::min(tokens, kMostBlocks * kernel->cubin.tokens);
    const int status = launch_part(*kernel, part, from, to, stream);
    if (status) return driver_->check(status, "cuLaunchKernel");
    tokens -= part;
    from += part * in;
    to += part * out;
  }
  return "";
}

// Wrong bits would let the kernel read anywhere, so they are looked at once, in a copy. Makes what
// the kernel wants beside the weight: a zero for each row, as nothing precedes its only split,
// and, where rows aren't whole blocks of columns, padded ones.
Error CudaProduct::prepare_masks() {
  const size_t rows = static_cast<size_t>(weight_.rows);
  const size_t width = static_cast<size_t>((weight_.columns + 7) / 8);
  std::vector<uint8_t> bits(rows * width);
  std::vector<int64_t> offsets(rows);
  int status = driver_->cuMemcpyDtoH_v2(bits.data(), address(weight_.bitmask), bits.size());
  if (!status) {
    status = driver_->cuMemcpyDtoH_v2(offsets.data(), address(weight_.row_offsets), rows * 8);
  }
  if (status) return driver_->check(status, "reading the weight");
  graphprune_bitmap host = weight_;
  host.bitmask = bits.data();
  host.row_offsets = offsets.data();
  int64_t row = 0;
  const int bad = graphprune_verify(&host, &row);
  if (bad) {
    return std::string(bad == GRAPHPRUNE_BAD_BITMASK   ? "the bits"
                       : bad == GRAPHPRUNE_BAD_OFFSETS ? "row_offsets"
                                                       : "the sizes") +
           " of row " + std::to_string(row) + " are wrong";
  }
  const size_t padded = (width + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  const bool pad = padded != width || address(weight_.bitmask) % kBlockBytes;
  const size_t zeros = (rows * 4 + kMaskAlignment - 1) / kMaskAlignment * kMaskAlignment;
  std::vector<uint8_t> made(zeros + (pad ? rows * padded : 0));
  for (size_t at = 0; pad && at < rows; ++at) {
    memcpy(&made[zeros + at * padded], &bits[at * width], width);
  }
  if (!status) status = driver_->cuCtxGetCurrent(&context_);
  if (!status) status = driver_->cuMemAlloc_v2(&scratch_, made.size());
  if (!status) status = driver_->cuMemcpyHtoD_v2(scratch_, made.data(), made.size());
  // The copy may still be on its way, and the session's stream doesn't wait for the default one.
  if (!status) status = driver_->cuStreamSynchronize(nullptr);
  if (status) return driver_->check(status, "preparing the weight");
  words_ = pad ? scratch_ + zeros : address(weight_.bitmask);
  return "";
}

// The smallest block that holds all tokens, else the largest; wide loads where they are allowed.
const cuda::Loaded* CudaProduct::choose(int64_t tokens, const void* x, const void* y) const {
  // Any alignment that is wanted divides this just if it divides each.
  const cuda::Address together =
      address(x) | address(y) | words_ | scratch_ | address(weight_.values) |
      address(weight_.row_offsets) | static_cast<cuda::Address>(weight_.rows) |
      static_cast<cuda::Address>(weight_.columns);
  const cuda::Loaded* best = nullptr;
  for (const cuda::Loaded& each : kernels_->loaded) {
    if (together % static_cast<cuda::Address>(each.cubin.multiple)) continue;
    if (!best || (best->cubin.tokens < tokens && best->cubin.tokens < each.cubin.tokens)) {
      best = &each;
    }
  }
  return best;
}

int CudaProduct::launch_part(const cuda::Loaded& kernel, int64_t part, const void* x, void* y,
                             cuda::Stream stream) const {
  const cuda::Cubin& cubin = kernel.cubin;
  // In the order of cuda::Parameter; the zeros come before the masks in the scratch memory.
  cuda::Address pointers[] = {address(x), words_,   address(weight_.row_offsets),
                              scratch_,   address(weight_.values), address(y)};
  const int32_t columns = static_cast<int32_t>(weight_.columns);
  int32_t numbers[] = {static_cast<int32_t>(part), static_cast<int32_t>(weight_.rows), columns,
                       columns};
  cuda::Address null = 0;
  void* parameters[cuda::kParameters + cuda::kMostExtra];
  std::fill(std::begin(parameters), std::end(parameters), &null);
  for (int at = 0; at < cuda::kParameters; ++at) {
    const int which = kernels_->order[at];
    parameters[at] = which < cuda::kTokens ? static_cast<void*>(&pointers[which])
                                           : &numbers[which - cuda::kTokens];
  }
  const auto blocks = [](int64_t all, int each) {
    return static_cast<unsigned>((all + each - 1) / each);
  };
  return driver_->cuLaunchKernel(
      kernel.function, blocks(weight_.rows, cubin.rows), 1, blocks(part, cubin.tokens),
      static_cast<unsigned>(cubin.warps * kWarp), 1, 1, static_cast<unsigned>(cubin.shared),
      stream, parameters, nullptr);
}

}  // namespace graphprune

int graphprune_cuda_prepare(const graphprune_bitmap* weight, void* stream, void** made, char* why,
                            uint64_t size) {
  *made = nullptr;
  try {
    auto product = std::make_unique<graphprune::CudaProduct>();
    const graphprune::cuda::Error error =
        product->prepare(*weight, static_cast<graphprune::cuda::Stream>(stream));
    if (error.empty()) *made = product.release();
    return graphprune::report(error, why, size);
  } catch (const std::exception& e) {
    return graphprune::report(e.what(), why, size);
  }
}

int graphprune_cuda_launch(void* made, int64_t tokens, const void* x, void* y, void* stream,
                           char* why, uint64_t size) {
  const auto* product = static_cast<const graphprune::CudaProduct*>(made);
  const auto on = static_cast<graphprune::cuda::Stream>(stream);
  return graphprune::report(product->launch(tokens, x, y, on), why, size);
}

void graphprune_cuda_release(void* made) { delete static_cast<graphprune::CudaProduct*>(made); }
