// Stands in for the library with which torch brings NVRTC and the CUDA driver: its "GPU" is memory of
// this process. What it compiles is the name of the kernel, which `stand_in_launch` is called with; given
// a real NVRTC, it compiles with that. Tests set what it says and which calls fail.

#include <dlfcn.h>
#include <fenv.h>
#include <locale.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kNotFound = 500;
constexpr std::size_t kArgumentBytes = 32736;  // of the launch table

struct Failure {
  int result = 0, after = 0;  // calls that still succeed
};

struct State {
  std::recursive_mutex mutex;
  std::map<std::string, long> settings{{"driver_version", 13000},
                                       {"nvrtc_version", 12080},
                                       {"device_count", 1},
                                       {"major", 9},
                                       {"minor", 0},
                                       {"oldest_architecture", 75},  // of those that NVRTC knows
                                       {"capturing", 0},
                                       {"asynchronous", 0},      // nothing is done before it must
                                       {"keeps_subnormals", 0},  // whatever the thread does
                                       {"compile_ms", 0}};
  std::string model = "Stand-in";
  std::map<std::string, Failure> failures;
  std::map<std::string, long> calls;
  void* nvrtc = nullptr;
  int (*launch)(const char* name, const void* table, unsigned blocks, unsigned threads,
                void* stream) = nullptr;
  std::vector<std::string> loaded;  // what became a module
  std::vector<std::function<int()>> to_do;
};

State& state() {
  static State* const state = new State;
  return *state;
}

// Counts a call; what it is to fail with.
int begin(const char* name) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> lock(s.mutex);
  ++s.calls[name];
  const auto found = s.failures.find(name);
  if (found == s.failures.end() || found->second.after-- > 0) return 0;
  return found->second.result;
}

long setting(const char* name) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  return state().settings[name];
}

// Does it now, or when somebody waits.
int soon(std::function<int()> work) {
  if (setting("asynchronous") == 0) return work();
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().to_do.push_back(std::move(work));
  return 0;
}

template <typename... Arguments>
int forward(const char* name, Arguments... arguments) {
  auto* const function = reinterpret_cast<int (*)(Arguments...)>(dlsym(state().nvrtc, name));
  return function == nullptr ? kNotFound : function(arguments...);
}

struct Module {
  std::string image;
};
struct Function {
  std::string name;
};
struct Program {
  std::string source, options;
};

thread_local std::vector<void*> contexts;
int context;

}  // namespace

// For tests ----------------------------------------------------------------------------------

EXPORT void stand_in_set(const char* name, long value) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().settings[name] = value;
}
EXPORT void stand_in_name(const char* model) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().model = model;
}
// All settings as at first, and no failures.
EXPORT void stand_in_reset() {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  const State fresh;
  state().settings = fresh.settings;
  state().model = fresh.model;
  state().failures.clear();
  state().calls.clear();
}
// 0 for `result`: it does not fail any more.
EXPORT void stand_in_fail(const char* function, int result, int after) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().failures[function] = {result, after};
  if (result == 0) state().failures.erase(function);
}
EXPORT long stand_in_calls(const char* function) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  return state().calls[function];
}
EXPORT void stand_in_run_with(void* launch) {
  state().launch = reinterpret_cast<decltype(state().launch)>(launch);
}
EXPORT int stand_in_compile_with(const char* nvrtc) {
  state().nvrtc = *nvrtc == '\0' ? nullptr : dlopen(nvrtc, RTLD_NOW | RTLD_LOCAL);
  return *nvrtc == '\0' || state().nvrtc != nullptr;
}
EXPORT int stand_in_contexts() { return static_cast<int>(contexts.size()); }
// The last module that was loaded; its size.
EXPORT long stand_in_image(const char** image) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  if (state().loaded.empty()) return 0;
  *image = state().loaded.back().data();
  return static_cast<long>(state().loaded.back().size());
}

// The driver ---------------------------------------------------------------------------------

#define BEGIN                                            \
  if (const int result = begin(__func__); result != 0) { \
    return result;                                       \
  }

EXPORT int cuInit(unsigned) { BEGIN return 0; }
EXPORT int cuDriverGetVersion(int* version) {
  BEGIN* version = static_cast<int>(setting("driver_version"));
  return 0;
}
EXPORT int cuGetErrorString(int result, const char** text) {
  BEGIN* text = result == kOutOfMemory ? "out of memory" : "an error of the stand-in";
  return 0;
}
EXPORT int cuDeviceGetCount(int* count) {
  BEGIN* count = static_cast<int>(setting("device_count"));
  return 0;
}
EXPORT int cuDeviceGet(int* device, int index) {
  BEGIN* device = index;
  return 0;
}
EXPORT int cuDeviceGetName(char* name, int size, int) {
  BEGIN const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  std::strncpy(name, state().model.c_str(), static_cast<std::size_t>(size));
  return 0;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  BEGIN if (attribute != 75 && attribute != 76) return kInvalidValue;
  const std::string name = attribute == 75 ? "major" : "minor";
  const std::string own = name + std::to_string(device);  // of one device alone
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  const auto& settings = state().settings;
  *value = static_cast<int>(settings.count(own) != 0 ? settings.at(own) : settings.at(name));
  return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void** out, int) {
  BEGIN* out = &context;
  return 0;
}
EXPORT int cuCtxPushCurrent_v2(void* pushed) {
  BEGIN contexts.push_back(pushed);
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(void** popped) {
  BEGIN if (contexts.empty()) return kInvalidValue;
  *popped = contexts.back();
  contexts.pop_back();
  return 0;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  thread_local int current = 0;
  BEGIN std::swap(*mode, current);
  return 0;
}
EXPORT int cuModuleLoadData(Module** module, const void* image) {
  BEGIN const char* const text = static_cast<const char*>(image);
  const bool is_machine_code = std::memcmp(text,
                                           "\x7F"
                                           "ELF",
                                           4) == 0;
  const std::string mine = "stand-in: ";
  if (!is_machine_code && std::strstr(text, ".entry") == nullptr &&
      std::strncmp(text, mine.c_str(), mine.size()) != 0) {
    return kInvalidImage;
  }
  *module = new Module{is_machine_code ? "" : text};
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().loaded.push_back((*module)->image);
  return 0;
}
EXPORT int cuModuleUnload(Module* module) {
  BEGIN delete module;
  return 0;
}
EXPORT int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  BEGIN if (!module->image.empty() && module->image.find(name) == std::string::npos) {
    return kNotFound;
  }
  *function = new Function{name};
  return 0;
}
EXPORT int cuFuncGetAttribute(int* value, int, Function*) {
  BEGIN* value = 0;
  return 0;
}

namespace {

int run(const Function& function, const void* table, unsigned blocks, unsigned threads,
        void* stream) {
  fenv_t before;
  const bool keeps_subnormals = setting("keeps_subnormals") != 0;
  if (keeps_subnormals) {
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
  }
  const int done = state().launch(function.name.c_str(), table, blocks, threads, stream);
  if (keeps_subnormals) fesetenv(&before);
  return done != 0 ? 0 : kNotFound;
}

}  // namespace

EXPORT int cuLaunchKernel(Function* function, unsigned blocks, unsigned, unsigned, unsigned threads,
                          unsigned, unsigned, unsigned, void* stream, void** arguments, void**) {
  BEGIN if (contexts.empty()) return kInvalidValue;
  if (state().launch == nullptr) return 0;
  if (setting("asynchronous") == 0) {
    return run(*function, arguments[0], blocks, threads, stream);
  }
  struct alignas(16) Arguments {
    char bytes[kArgumentBytes];
  } copy;
  std::memcpy(copy.bytes, arguments[0], kArgumentBytes);
  return soon([=] { return run(*function, copy.bytes, blocks, threads, stream); });
}
EXPORT int cuStreamIsCapturing(void*, int* status) {
  BEGIN* status = static_cast<int>(setting("capturing"));
  return 0;
}
EXPORT int cuStreamCreate(void** stream, unsigned) {
  BEGIN* stream = new char;
  return 0;
}
EXPORT int cuStreamDestroy_v2(void* stream) {
  BEGIN delete static_cast<char*>(stream);
  return 0;
}
EXPORT int cuStreamSynchronize(void*) {
  BEGIN const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  int result = 0;
  for (const auto& work : std::exchange(state().to_do, {})) result = std::max(result, work());
  return result;
}
EXPORT int cuMemAlloc_v2(unsigned long long* memory, std::size_t bytes) {
  BEGIN void* made = nullptr;
  if (posix_memalign(&made, 256, bytes) != 0) return kOutOfMemory;
  *memory = reinterpret_cast<unsigned long long>(made);
  return 0;
}
EXPORT int cuMemFree_v2(unsigned long long memory) {
  BEGIN std::free(reinterpret_cast<void*>(memory));
  return 0;
}
EXPORT int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, std::size_t n, void*) {
  BEGIN return soon([=] {
    std::memcpy(reinterpret_cast<void*>(to), from, n);
    return 0;
  });
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, std::size_t n, void*) {
  BEGIN return soon([=] {
    std::memcpy(to, reinterpret_cast<const void*>(from), n);
    return 0;
  });
}
EXPORT int cuMemsetD32Async(unsigned long long to, unsigned value, std::size_t count, void*) {
  BEGIN for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(to)[i] = value;
  return 0;
}

// NVRTC --------------------------------------------------------------------------------------

#define BEGIN_NVRTC(...) BEGIN if (state().nvrtc != nullptr) return forward(__func__, __VA_ARGS__);

namespace {

// As NVRTC 12.8, nearly: with a gap between two generations, and within one.
std::vector<int> known_architectures() {
  std::vector<int> known{75, 80, 86, 90, 100, 101, 120};
  const long oldest = setting("oldest_architecture");
  known.erase(known.begin(), std::find_if(known.begin(), known.end(), [=](int architecture) {
                return architecture >= oldest;
              }));
  return known;
}

}  // namespace

EXPORT const char* nvrtcGetErrorString(int) { return "an error of NVRTC"; }
EXPORT int nvrtcVersion(int* major, int* minor) {
  BEGIN_NVRTC(major, minor)
  *major = static_cast<int>(setting("nvrtc_version") / 1000);
  *minor = static_cast<int>(setting("nvrtc_version") % 1000 / 10);
  return 0;
}

#if !defined(STAND_IN_OLD)  // a library that lacks a symbol
EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  BEGIN_NVRTC(count)
  *count = static_cast<int>(known_architectures().size());
  return 0;
}
#endif

EXPORT int nvrtcGetSupportedArchs(int* architectures) {
  BEGIN_NVRTC(architectures)
  const std::vector<int> known = known_architectures();
  std::copy(known.begin(), known.end(), architectures);
  return 0;
}
EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char* name, int count,
                              const char* const* texts, const char* const* names) {
  BEGIN_NVRTC(program, source, name, count, texts, names)
  *program = new Program{source, ""};
  return 0;
}
EXPORT int nvrtcDestroyProgram(Program** program) {
  BEGIN_NVRTC(program)
  delete *program;
  return 0;
}
EXPORT int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  BEGIN_NVRTC(program, count, options)
  for (int i = 0; i < count; ++i) program->options += std::string(options[i]) + " ";
  usleep(static_cast<useconds_t>(setting("compile_ms")) * 1000);
  uselocale(newlocale(LC_ALL_MASK, "C", nullptr));  // as NVRTC does
  return 0;
}
EXPORT int nvrtcGetProgramLogSize(Program* program, std::size_t* size) {
  BEGIN_NVRTC(program, size)
  *size = 9;
  return 0;
}
EXPORT int nvrtcGetProgramLog(Program* program, char* log) {
  BEGIN_NVRTC(program, log)
  std::memcpy(log, "some log", 9);
  return 0;
}

namespace {

std::string compiled(const Program& program) {
  const std::string entry = "extern \"C\" __global__ void\n";
  const std::size_t at = program.source.find('\n', program.source.rfind(entry) + entry.size()) + 1;
  return "stand-in: " + program.source.substr(at, program.source.find('(', at) - at) + " " +
         program.options;
}

}  // namespace

EXPORT int nvrtcGetCUBINSize(Program* program, std::size_t* size) {
  BEGIN_NVRTC(program, size)
  *size = compiled(*program).size() + 1;
  return 0;
}
EXPORT int nvrtcGetCUBIN(Program* program, char* to) {
  BEGIN_NVRTC(program, to)
  std::strcpy(to, compiled(*program).c_str());
  return 0;
}
EXPORT int nvrtcGetPTXSize(Program* program, std::size_t* size) {
  BEGIN_NVRTC(program, size)
  return nvrtcGetCUBINSize(program, size);
}
EXPORT int nvrtcGetPTX(Program* program, char* to) {
  BEGIN_NVRTC(program, to)
  return nvrtcGetCUBIN(program, to);
}
