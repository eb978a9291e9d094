#include "bitmap_linear.h"

#include <stdlib.h>

#include "product.h"
#include "thread_pool.h"

namespace graphprune {
namespace {

const Variant* const kVariants[] = {
#ifdef GRAPHPRUNE_X86
    &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kPortable,
};
constexpr int kCount = sizeof kVariants / sizeof *kVariants;

// Below some microseconds of work a thread costs more than it saves.
constexpr int64_t kPartWork = 1 << 16;

std::atomic<const Variant*> forced{nullptr};

const Variant* best_variant() {
  static const Variant* const best = [] {
    for (const Variant* variant : kVariants) {
      if (variant->supported()) return variant;
    }
    return &kPortable;
  }();
  return best;
}

// The variant itself, or for types that it leaves to the ones below it, the next that has them.
Rows rows_of(const Variant* variant, int32_t value_type) {
  bool below = false;
  for (const Variant* each : kVariants) {
    below = below || each == variant;
    if (below && each->rows[value_type]) return each->rows[value_type];
  }
  return kPortable.rows[value_type];
}

bool known_type(int32_t type) { return GRAPHPRUNE_FLOAT32 <= type && type <= GRAPHPRUNE_FLOAT16; }

int check_weight(const graphprune_bitmap& weight) {
  constexpr int64_t most = int64_t{1} << 40;  // keeps the products below from overflowing
  if (weight.rows < 0 || weight.columns < 0 || weight.nonzeros < 0) return GRAPHPRUNE_BAD_ARGUMENT;
  if (weight.rows > most || weight.columns > most) return GRAPHPRUNE_BAD_ARGUMENT;
  if (!known_type(weight.value_type)) return GRAPHPRUNE_BAD_ARGUMENT;
  if (weight.nonzeros && !weight.values) return GRAPHPRUNE_BAD_ARGUMENT;
  if (weight.rows && (!weight.row_offsets || (weight.columns && !weight.bitmask))) {
    return GRAPHPRUNE_BAD_ARGUMENT;
  }
  return GRAPHPRUNE_OK;
}

// The first row whose values aren't `columns` at most, behind those of the row before; or -1.
int64_t bad_offset(const graphprune_bitmap& weight) {
  if (weight.rows == 0) return -1;
  if (weight.row_offsets[0] != 0) return 0;
  int64_t begin = 0;
  for (int64_t row = 0; row < weight.rows; ++row) {
    const int64_t end = row + 1 < weight.rows ? weight.row_offsets[row + 1] : weight.nonzeros;
    if (end < begin || end > weight.nonzeros || end - begin > weight.columns) return row;
    begin = end;
  }
  return -1;
}

int64_t count_bits(const uint8_t* bytes, int64_t count) {
  int64_t bits = 0, at = 0;
  for (; at + 8 <= count; at += 8) {
    uint64_t word;
    memcpy(&word, bytes + at, 8);
    bits += __builtin_popcountll(word);
  }
  for (; at < count; ++at) bits += __builtin_popcount(bytes[at]);
  return bits;
}

}  // namespace

const Variant* current_variant() {
  const Variant* variant = forced.load();
  return variant ? variant : best_variant();
}

void finish(const Job& job, int64_t token, int64_t row, float sum) {
  if (job.bias) sum += read_float(job.bias, job.io_type, row);
  const int64_t at = token * job.weight.rows + row;
  if (job.io_type == GRAPHPRUNE_FLOAT32) {
    static_cast<float*>(job.y)[at] = sum;
  } else {
    static_cast<uint16_t*>(job.y)[at] =
        job.io_type == GRAPHPRUNE_BFLOAT16 ? bfloat16_of_float(sum) : float16_of_float(sum);
  }
}

Product::~Product() { free(memory_); }

int Product::start(const graphprune_bitmap& weight, int32_t io_type, int64_t tokens, const void* x,
                   const void* bias, void* y) {
  const int status = check_weight(weight);
  if (status) return status;
  if (tokens < 0 || tokens > int64_t{1} << 40 || !known_type(io_type)) {
    return GRAPHPRUNE_BAD_ARGUMENT;
  }
  if ((tokens && weight.columns && !x) || (tokens && weight.rows && !y)) {
    return GRAPHPRUNE_BAD_ARGUMENT;
  }
  if (bad_offset(weight) >= 0) return GRAPHPRUNE_BAD_OFFSETS;
  job_.weight = weight;
  job_.row_bytes = (weight.columns + 7) / 8;
  job_.tokens = tokens;
  job_.io_type = io_type;
  job_.bias = bias;
  job_.y = y;
  job_.stride = (weight.columns + kGroup - 1) / kGroup * kGroup;
  const Variant* variant = current_variant();
  const bool bfloat16 =
      io_type == GRAPHPRUNE_BFLOAT16 && weight.value_type == GRAPHPRUNE_BFLOAT16;
  dot_ = bfloat16 && variant->dot;
  rows_ = dot_ ? variant->dot : rows_of(variant, weight.value_type);
  return ready_x(x) ? GRAPHPRUNE_OK : GRAPHPRUNE_NO_MEMORY;
}

// Makes x what the code wants: of its type, and with full groups of columns.
bool Product::ready_x(const void* x) {
  const int64_t columns = job_.weight.columns;
  const bool as_it_is = dot_ || job_.io_type == GRAPHPRUNE_FLOAT32;
  if (as_it_is && job_.stride == columns) {
    job_.x = x;
    return true;
  }
  if (job_.stride && job_.tokens > (int64_t{1} << 56) / job_.stride) return false;
  const size_t itemsize = dot_ ? sizeof(uint16_t) : sizeof(float);
  const size_t count = static_cast<size_t>(job_.tokens) * static_cast<size_t>(job_.stride);
  memory_ = calloc(count ? count : 1, itemsize);
  if (!memory_) return false;
  job_.x = memory_;
  for (int64_t token = 0; token < job_.tokens; ++token) {
    char* to = static_cast<char*>(memory_) + static_cast<size_t>(token * job_.stride) * itemsize;
    if (as_it_is) {
      const size_t bytes = static_cast<size_t>(columns) * itemsize;
      memcpy(to, static_cast<const char*>(x) + static_cast<size_t>(token) * bytes, bytes);
      continue;
    }
    float* floats = reinterpret_cast<float*>(to);
    for (int64_t column = 0; column < columns; ++column) {
      floats[column] = read_float(x, job_.io_type, token * columns + column);
    }
  }
  return true;
}

int Product::parts(int64_t at_most) const {
  const int64_t blocks = (job_.weight.rows + kBlock - 1) / kBlock;
  const int64_t groups = job_.tokens < 8 ? 1 : job_.tokens / 8;
  const double work = static_cast<double>(job_.weight.rows) *
                      static_cast<double>(job_.weight.columns) * static_cast<double>(groups);
  int64_t parts = at_most < blocks ? at_most : blocks;
  if (work < static_cast<double>(parts) * kPartWork) {
    parts = static_cast<int64_t>(work / kPartWork);
  }
  return parts < 1 ? 1 : static_cast<int>(parts < 1024 ? parts : 1024);
}

// Rows are split by their bytes: those of the values, and of the bits, which all rows have.
int64_t Product::first_row(int part, int parts) const {
  const int64_t itemsize = job_.weight.value_type == GRAPHPRUNE_FLOAT32 ? 4 : 2;
  const int64_t row_cost = job_.row_bytes + 1;
  const int64_t total = job_.weight.nonzeros * itemsize + job_.weight.rows * row_cost;
  const int64_t wanted = total / parts * part;
  int64_t low = 0, high = (job_.weight.rows + kBlock - 1) / kBlock;
  if (part >= parts) return job_.weight.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2, row = middle * kBlock;
    if (job_.row_begin(row) * itemsize + row * row_cost < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t row = low * kBlock;
  return row < job_.weight.rows ? row : job_.weight.rows;
}

void Product::run(int part, int parts) {
  if (job_.tokens == 0) return;
  const int64_t begin = first_row(part, parts), end = first_row(part + 1, parts);
  if (begin < end && !rows_(job_, begin, end)) failed_.store(true);
}

}  // namespace graphprune

using graphprune::Product;

int32_t graphprune_native_version(void) { return GRAPHPRUNE_NATIVE_VERSION; }

const char* graphprune_variant(void) { return graphprune::current_variant()->name; }

int graphprune_force_variant(const char* name) {
  if (!name) {
    graphprune::forced.store(nullptr);
    return GRAPHPRUNE_OK;
  }
  for (const graphprune::Variant* variant : graphprune::kVariants) {
    if (strcmp(variant->name, name) == 0 && variant->supported()) {
      graphprune::forced.store(variant);
      return GRAPHPRUNE_OK;
    }
  }
  return GRAPHPRUNE_UNSUPPORTED;
}

int graphprune_verify(const graphprune_bitmap* weight, int64_t* row) {
  *row = 0;
  const int status = weight ? graphprune::check_weight(*weight) : GRAPHPRUNE_BAD_ARGUMENT;
  if (status) return status;
  const int64_t bad = graphprune::bad_offset(*weight);
  if (bad >= 0) {
    *row = bad;
    return GRAPHPRUNE_BAD_OFFSETS;
  }
  const int64_t row_bytes = (weight->columns + 7) / 8;
  const int rest = static_cast<int>(weight->columns % 8);
  for (int64_t at = 0; at < weight->rows; ++at) {
    const uint8_t* bits = weight->bitmask + at * row_bytes;
    const int64_t end = at + 1 < weight->rows ? weight->row_offsets[at + 1] : weight->nonzeros;
    const bool fits = graphprune::count_bits(bits, row_bytes) == end - weight->row_offsets[at];
    if (!fits || (rest && bits[row_bytes - 1] >> rest)) {
      *row = at;
      return GRAPHPRUNE_BAD_BITMASK;
    }
  }
  return GRAPHPRUNE_OK;
}

int graphprune_bitmap_linear(const graphprune_bitmap* weight, int32_t io_type, int64_t tokens,
                             const void* x, const void* bias, void* y, int32_t threads) {
  if (!weight || threads < 1) return GRAPHPRUNE_BAD_ARGUMENT;
  Product product;
  const int status = product.start(*weight, io_type, tokens, x, bias, y);
  if (status) return status;
  struct Run {
    Product* product;
    int parts;
  } run{&product, product.parts(threads)};
  graphprune::run_parts(
      run.parts,
      [](void* argument, int part) {
        const Run* all = static_cast<const Run*>(argument);
        all->product->run(part, all->parts);
      },
      &run);
  return product.status();
}
