// Stands for libcuda.so.1 in tests: memory is the host's, and a launch calls back into Python.

#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Launch = int (*)(int module, const char* kernel, const unsigned* numbers, void* stream,
                       void** parameters);

struct Module {
  std::string image;
};
struct Function {
  int module;
  std::string name;
};

std::string calls;
std::string failing;
std::vector<Module*> modules;
int major, minor, capturing, allocated;
void* context;
Launch launch;

int called(const char* name) {
  calls += std::string(name) + " ";
  return failing == name ? 1 : 0;
}

// Bytes of an ELF file, which ends with a table of headers.
size_t size_of(const char* image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return strlen(image);
  unsigned long long programs, sections;
  unsigned short counts[4];  // size and number of program headers, of section headers
  memcpy(&programs, image + 32, 8);
  memcpy(&sections, image + 40, 8);
  memcpy(counts, image + 54, 8);
  const size_t a = programs + counts[0] * counts[1], b = sections + counts[2] * counts[3];
  return a > b ? a : b;
}

}  // namespace

API void fake_reset(int new_major, int new_minor, Launch new_launch) {
  major = new_major;
  minor = new_minor;
  launch = new_launch;
  calls = failing = "";
  capturing = allocated = 0;
  context = &context;
  modules.clear();
}
API const char* fake_calls() { return calls.c_str(); }
API void fake_forget() { calls = ""; }
API void fake_fail(const char* name) { failing = name; }
API void fake_capture(int on) { capturing = on; }
API void fake_context(void* current) { context = current; }
API int fake_allocated() { return allocated; }
API int fake_modules() { return static_cast<int>(modules.size()); }
API const char* fake_image(int module, unsigned long long* size) {
  *size = modules[module]->image.size();
  return modules[module]->image.data();
}

API int cuInit(unsigned) { return called("cuInit"); }
API int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return 0;
}
API int cuCtxGetCurrent(void** current) {
  *current = context;
  return called("cuCtxGetCurrent");
}
API int cuCtxGetDevice(int* device) {
  *device = 3;
  return called("cuCtxGetDevice");
}
API int cuCtxPushCurrent_v2(void*) { return called("cuCtxPushCurrent"); }
API int cuCtxPopCurrent_v2(void** popped) {
  *popped = context;
  return called("cuCtxPopCurrent");
}
API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 3) return 101;
  *value = attribute == 75 ? major : attribute == 76 ? minor : attribute == 97 ? 99 * 1024 : -1;
  return called("cuDeviceGetAttribute");
}
API int cuModuleLoadData(void** module, const void* image) {
  const char* bytes = static_cast<const char*>(image);
  modules.push_back(new Module{std::string(bytes, size_of(bytes))});
  *module = reinterpret_cast<void*>(modules.size());
  return called("cuModuleLoadData");
}
API int cuModuleUnload(void*) { return called("cuModuleUnload"); }
API int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = new Function{static_cast<int>(reinterpret_cast<size_t>(module)) - 1, name};
  return called("cuModuleGetFunction");
}
API int cuFuncSetAttribute(void*, int attribute, int value) {
  return called(("cuFuncSetAttribute:" + std::to_string(attribute) + ":" + std::to_string(value))
                    .c_str());
}
API int cuMemAlloc_v2(unsigned long long* address, size_t size) {
  void* made = aligned_alloc(256, (size + 255) / 256 * 256);
  memset(made, 0xA5, size);
  *address = reinterpret_cast<unsigned long long>(made);
  ++allocated;
  return called("cuMemAlloc");
}
API int cuMemFree_v2(unsigned long long address) {
  free(reinterpret_cast<void*>(address));
  --allocated;
  return called("cuMemFree");
}
API int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t size) {
  memcpy(reinterpret_cast<void*>(to), from, size);
  return called("cuMemcpyHtoD");
}
API int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t size) {
  memcpy(to, reinterpret_cast<void*>(from), size);
  return called("cuMemcpyDtoH");
}
API int cuStreamSynchronize(void*) { return called("cuStreamSynchronize"); }
API int cuStreamIsCapturing(void*, int* status) {
  *status = capturing;
  return called("cuStreamIsCapturing");
}
API int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                       unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                       void** parameters, void** extra) {
  const unsigned numbers[] = {x, y, z, threads_x, threads_y, threads_z, shared};
  const Function* function = static_cast<Function*>(kernel);
  const int status = called("cuLaunchKernel");
  if (status || extra) return 1;
  return launch(function->module, function->name.c_str(), numbers, stream, parameters);
}
