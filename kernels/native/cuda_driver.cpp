// CUDA's driver and the cubins.

#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <utility>

namespace graphprune {
namespace cuda {
namespace {

constexpr int kManifestFormat = 1;  // FORMAT in kernels/gpu/prebuilt.py
constexpr int kPlainShared = 48 * 1024;  // bytes that a kernel gets without asking
// Names in the kernel (kernels/gpu/bitmap_triton.py), in the order of Parameter.
const char* const kNames[kParameters] = {"x_ptr",      "words_ptr",    "offsets_ptr", "before_ptr",
                                         "values_ptr", "partials_ptr", "M",           "N",
                                         "K",          "stride"};

struct Manifest {
  std::string folder;
  int order[kParameters] = {};
  std::vector<Cubin> cubins;
};

// Guards what follows.
std::mutex mutex;
std::string driver_name, cubin_folder;  // for tests
std::unique_ptr<Driver> opened;
std::unique_ptr<Manifest> manifest;
std::map<std::pair<Context, int32_t>, std::unique_ptr<Kernels>> kernels_of;

template <class Pointer>
bool find(void* library, const char* name, Pointer* function) {
  *function = reinterpret_cast<Pointer>(dlsym(library, name));
  return *function;
}

Error open_library(Driver* driver) {
  const char* name = driver_name.empty() ? "libcuda.so.1" : driver_name.c_str();
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::string("CUDA's driver can't be opened: ") + dlerror();
  const char* missing = nullptr;
#define GRAPHPRUNE_FIND(function) \
  if (!find(library, #function, &driver->function) && !missing) missing = #function
  GRAPHPRUNE_FIND(cuInit);
  GRAPHPRUNE_FIND(cuGetErrorName);
  GRAPHPRUNE_FIND(cuCtxGetCurrent);
  GRAPHPRUNE_FIND(cuCtxGetDevice);
  GRAPHPRUNE_FIND(cuCtxPushCurrent_v2);
  GRAPHPRUNE_FIND(cuCtxPopCurrent_v2);
  GRAPHPRUNE_FIND(cuDeviceGetAttribute);
  GRAPHPRUNE_FIND(cuModuleLoadData);
  GRAPHPRUNE_FIND(cuModuleUnload);
  GRAPHPRUNE_FIND(cuModuleGetFunction);
  GRAPHPRUNE_FIND(cuFuncSetAttribute);
  GRAPHPRUNE_FIND(cuMemAlloc_v2);
  GRAPHPRUNE_FIND(cuMemFree_v2);
  GRAPHPRUNE_FIND(cuMemcpyHtoD_v2);
  GRAPHPRUNE_FIND(cuMemcpyDtoH_v2);
  GRAPHPRUNE_FIND(cuStreamSynchronize);
  GRAPHPRUNE_FIND(cuStreamIsCapturing);
  GRAPHPRUNE_FIND(cuLaunchKernel);
#undef GRAPHPRUNE_FIND
  find(library, "cuFuncLoad", &driver->cuFuncLoad);
  if (missing) return std::string("CUDA's driver ") + name + " has no " + missing;
  return driver->check(driver->cuInit(0), "cuInit");
}

// The folder `cubins` beside this library.
std::string default_folder() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&graphprune_cuda_paths), &info) || !info.dli_fname) return "";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "cubins" : file.substr(0, slash) + "/cubins";
}

bool type_of(const std::string& name, int32_t* type) {
  *type = name == "fp32"   ? GRAPHPRUNE_FLOAT32
          : name == "bf16" ? GRAPHPRUNE_BFLOAT16
          : name == "fp16" ? GRAPHPRUNE_FLOAT16
                           : -1;
  return *type >= 0;
}

// Whether it names every parameter once.
bool read_order(std::istream& words, int* order) {
  std::string word;
  unsigned seen = 0;
  for (int at = 0; at < kParameters; ++at) {
    if (!(words >> word)) return false;
    order[at] = static_cast<int>(std::find(kNames, kNames + kParameters, word) - kNames);
    if (order[at] < kParameters) seen |= 1u << order[at];
  }
  return seen == (1u << kParameters) - 1 && !(words >> word);
}

bool read_cubin(std::istream& words, Cubin* cubin) {
  std::string type;
  words >> cubin->file >> cubin->architecture >> type >> cubin->tokens >> cubin->rows >>
      cubin->warps >> cubin->shared >> cubin->multiple >> cubin->extra >> cubin->entry;
  return words && type_of(type, &cubin->type) && cubin->tokens > 0 && cubin->rows > 0 &&
         cubin->warps > 0 && cubin->warps <= 32 && cubin->shared >= 0 && cubin->multiple > 0 &&
         cubin->extra >= 0 && cubin->extra <= kMostExtra;
}

Error read_manifest(Manifest* made) {
  made->folder = cubin_folder.empty() ? default_folder() : cubin_folder;
  const std::string path = made->folder + "/manifest.txt";
  std::ifstream file(path);
  if (!file) return path + " can't be read: the folder of cubins belongs beside the library";
  bool format = false, order = false, constants = false;
  for (std::string line, key; std::getline(file, line);) {
    std::istringstream words(line);
    if (!(words >> key) || key[0] == '#') continue;
    bool good = true;
    int number = 0;
    if (key == "format") {
      good = format = (words >> number) && number == kManifestFormat;
    } else if (key == "parameters") {
      good = order = read_order(words, made->order);
    } else if (key == "constants") {
      // What `Product` relies on.
      const std::string text = line + " ";
      good = constants = text.find(" COLUMNS=64 ") != text.npos &&
                         text.find(" splits=1 ") != text.npos;
    } else if (key == "cubin") {
      made->cubins.emplace_back();
      good = read_cubin(words, &made->cubins.back());
    }
    if (!good) return path + " isn't of this library's version: " + line;
  }
  if (!format || !order || !constants) return path + " is incomplete";
  return "";
}

// With the mutex held.
Error manifest_of(const Manifest** found) {
  if (!manifest) {
    auto made = std::make_unique<Manifest>();
    const Error error = read_manifest(made.get());
    if (!error.empty()) return error;
    std::stable_sort(made->cubins.begin(), made->cubins.end(), [](const Cubin& a, const Cubin& b) {
      return std::make_pair(a.tokens, -a.multiple) < std::make_pair(b.tokens, -b.multiple);
    });
    manifest = std::move(made);
  }
  *found = manifest.get();
  return "";
}

Error load_cubin(const Driver& driver, const std::string& folder, int most_shared, Loaded* loaded) {
  const Cubin& cubin = loaded->cubin;
  const std::string path = folder + "/" + cubin.file;
  std::ifstream file(path, std::ios::binary);
  const std::string code{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (code.empty()) return path + " can't be read";
  if (cubin.shared > most_shared) return path + " needs more shared memory than the GPU has";
  Module module = nullptr;
  Error error = driver.check(driver.cuModuleLoadData(&module, code.data()), "cuModuleLoadData");
  if (!error.empty()) return path + ": " + error + "; a newer driver may know it";
  error = driver.check(
      driver.cuModuleGetFunction(&loaded->function, module, cubin.entry.c_str()), "the kernel");
  if (error.empty() && cubin.shared > kPlainShared) {
    error = driver.check(
        driver.cuFuncSetAttribute(loaded->function, kFunctionDynamicShared, cubin.shared),
        "cuFuncSetAttribute");
  }
  // Otherwise the driver may put it off until the first launch, amid the capture of a graph.
  if (error.empty() && driver.cuFuncLoad) {
    error = driver.check(driver.cuFuncLoad(loaded->function), "cuFuncLoad");
  }
  if (error.empty()) return "";
  driver.cuModuleUnload(module);
  return path + ": " + error;
}

Error unknown_device(const Manifest& from, int major, int minor) {
  std::string known;
  for (const Cubin& cubin : from.cubins) {
    const std::string name = "sm_" + cubin.architecture;
    if ((known + ",").find(name + ",") == std::string::npos) {
      known += (known.empty() ? "" : ", ") + name;
    }
  }
  return "there is no kernel for a GPU of compute capability " + std::to_string(major) + "." +
         std::to_string(minor) + ", but for " + known +
         "; leave graphprune's library out, and ONNX Runtime computes with the dense weight";
}

}  // namespace

Error Driver::check(int status, const char* what) const {
  if (!status) return "";
  const char* name = nullptr;
  if (cuGetErrorName(status, &name) || !name) name = "an unknown error";
  return std::string(what) + ": " + name + " (" + std::to_string(status) + ")";
}

bool Cubin::runs_on(int major, int minor) const {
  char* end = nullptr;
  const int number = static_cast<int>(strtol(architecture.c_str(), &end, 10));
  if (number / 10 != major) return false;
  // With a letter, it uses what later devices needn't have.
  return *end ? number % 10 == minor : number % 10 <= minor;
}

Error open(const Driver** driver) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!opened) {
    auto made = std::make_unique<Driver>();
    const Error error = open_library(made.get());
    if (!error.empty()) return error;
    opened = std::move(made);
  }
  *driver = opened.get();
  return "";
}

Error check_cubins() {
  std::lock_guard<std::mutex> lock(mutex);
  const Manifest* unused = nullptr;
  return manifest_of(&unused);
}

Error load(const Driver& driver, int32_t type, const Kernels** kernels) {
  std::lock_guard<std::mutex> lock(mutex);
  Context context = nullptr;
  Error error = driver.check(driver.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (error.empty() && !context) error = "no CUDA context is current";
  if (!error.empty()) return error;
  auto& known = kernels_of[{context, type}];
  if (!known) {
    const Manifest* from = nullptr;
    error = manifest_of(&from);
    if (!error.empty()) return error;
    int device = 0, major = 0, minor = 0, most_shared = 0;
    int status = driver.cuCtxGetDevice(&device);
    if (!status) status = driver.cuDeviceGetAttribute(&major, kCapabilityMajor, device);
    if (!status) status = driver.cuDeviceGetAttribute(&minor, kCapabilityMinor, device);
    if (!status) status = driver.cuDeviceGetAttribute(&most_shared, kMostShared, device);
    if (status) return driver.check(status, "the properties of the GPU");
    auto made = std::make_unique<Kernels>();
    std::copy(from->order, from->order + kParameters, made->order);
    for (const Cubin& cubin : from->cubins) {
      if (cubin.type != type || !cubin.runs_on(major, minor)) continue;
      made->loaded.push_back({cubin, nullptr});
      error = load_cubin(driver, from->folder, most_shared, &made->loaded.back());
      if (!error.empty()) return error;
    }
    if (made->loaded.empty()) return unknown_device(*from, major, minor);
    known = std::move(made);
  }
  *kernels = known.get();
  return "";
}

}  // namespace cuda
}  // namespace graphprune

void graphprune_cuda_paths(const char* driver, const char* cubins) {
  using namespace graphprune::cuda;
  std::lock_guard<std::mutex> lock(mutex);
  driver_name = driver ? driver : "";
  cubin_folder = cubins ? cubins : "";
  opened.reset();
  manifest.reset();
  kernels_of.clear();
}
