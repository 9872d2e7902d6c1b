#pragma once

// The same memory twice: on a GPU and, for what the CPU makes of it, here.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../storage/dtype.h"
#include "driver.h"

namespace fusedopt {

// A stream and memory of a GPU, for as long as it lives. All throw DeviceProblem.
class TrialMemory {
 public:
  TrialMemory(const Driver& driver, std::size_t bytes);
  ~TrialMemory();
  TrialMemory(const TrialMemory&) = delete;
  TrialMemory& operator=(const TrialMemory&) = delete;

  cuda::Stream stream() const { return stream_; }
  std::byte* begin() const { return reinterpret_cast<std::byte*>(memory_); }
  // Both wait for the stream.
  void upload(const std::vector<std::byte>& from) const;
  void download(std::vector<std::byte>* to) const;

 private:
  const Driver& driver_;
  cuda::Stream stream_ = nullptr;
  cuda::Pointer memory_ = 0;
};

// Tensors in one piece of memory, with gaps that nobody may touch.
class Trial {
 public:
  // Random elements; its place. `shift`: elements behind an address that 64 divides.
  std::size_t add(Dtype dtype, std::int64_t numel, int shift, const std::string& name);
  // With a name, they are compared as 32 bits each.
  std::size_t add_zeros(std::size_t bytes, const std::string& name = "");

  void make_magnitudes(std::size_t place);  // of the elements of a tensor of floats
  template <typename T>
  void set(std::size_t place, T value) {
    *reinterpret_cast<T*>(host_.data() + place) = value;
  }

  std::vector<std::byte>& host() { return host_; }
  // What differs between the CPU's memory and the GPU's; empty if nothing does. A NaN is a NaN.
  // `tolerance` is for doubles, relative to the larger of them and 1.
  std::string difference(const std::vector<std::byte>& found, double tolerance) const;

 private:
  struct Tensor {
    std::size_t at;
    Dtype dtype;
    std::int64_t numel;
    std::string name;
  };
  std::uint32_t random();

  std::vector<std::byte> host_;
  std::vector<Tensor> tensors_;
  std::vector<std::size_t> gaps_;  // where they begin
  std::uint64_t random_ = 20;
};

}  // namespace fusedopt
