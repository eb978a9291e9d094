// A product that can be computed in parts, by whatever runs them.

#ifndef GRAPHPRUNE_PRODUCT_H
#define GRAPHPRUNE_PRODUCT_H

#include <atomic>

#include "job.h"

namespace graphprune {

class Product {
 public:
  ~Product();

  // Checks the arguments and readies x; on another status than GRAPHPRUNE_OK nothing may be run.
  int start(const graphprune_bitmap& weight, int32_t io_type, int64_t tokens, const void* x,
            const void* bias, void* y);

  // How many parts are worth their overhead.
  int parts(int64_t at_most) const;

  // One of `parts` parts, which may run at the same time.
  void run(int part, int parts);

  int status() const { return failed_.load() ? GRAPHPRUNE_NO_MEMORY : GRAPHPRUNE_OK; }

 private:
  bool ready_x(const void* x);
  int64_t first_row(int part, int parts) const;

  Job job_{};
  Rows rows_ = nullptr;
  bool dot_ = false;
  void* memory_ = nullptr;
  std::atomic<bool> failed_{false};
};

const Variant* current_variant();

}  // namespace graphprune
#endif
