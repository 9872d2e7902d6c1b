#include "gpu.h"

#include <atomic>
#include <string>

#include "kernels.h"

namespace fusedopt {

namespace {

std::atomic<std::int64_t> launches{0};
thread_local bool counts_launches = true;

}  // namespace

Gpu::Gpu(int device, cuda::Stream stream) : driver_(driver()), device_(device), stream_(stream) {
  const Device& known = fusedopt::device(device);
  table_bytes_ = fusedopt::table_bytes(known.compilation.argument_bytes());
  driver_.check(driver_.push_context(known.context),
                "fusedopt: using cuda:" + std::to_string(device));
}

Gpu::~Gpu() {
  cuda::Context context;
  driver_.pop_context(&context);
}

void Gpu::launch(const DeviceKernel& kernel, const LaunchTable& table) const {
  void* arguments[] = {const_cast<LaunchTable*>(&table)};
  driver_.check(driver_.launch(function_of(kernel, device_), table.num_chunks, 1, 1, kBlockThreads,
                               1, 1, 0, stream_, arguments, nullptr),
                "fusedopt: launching " + kernel.name + " on cuda:" + std::to_string(device_));
  launches += counts_launches;
}

void Gpu::wait() const {
  driver_.check(driver_.wait(stream_),
                "what cuda:" + std::to_string(device_) + " was given before");
}

void Gpu::try_to_zero(std::uint32_t* word) const {
  driver_.fill_words(reinterpret_cast<cuda::Pointer>(word), 0, 1, stream_);
}

bool is_capturing(cuda::Stream stream) {
  if (stream == nullptr) return false;  // the legacy stream cannot be captured
  int status = 0;
  // It fails where another thread captures in a mode that forbids this: the launch will tell.
  return driver().is_capturing(stream, &status) == 0 && status != 0;
}

std::int64_t num_launches() { return launches; }

UncountedLaunches::UncountedLaunches() { counts_launches = false; }
UncountedLaunches::~UncountedLaunches() { counts_launches = true; }

}  // namespace fusedopt
