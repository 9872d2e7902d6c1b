#include "trial.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "../storage/half.h"

namespace fusedopt {

namespace {

constexpr std::size_t kAlignment = 64, kGap = 64;
constexpr std::byte kUntouched{0x5A};

double value_at(const std::byte* from, Dtype dtype) {
  const auto read = [&](auto value) {
    std::memcpy(&value, from, sizeof(value));
    return value;
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return read(double());
    case Dtype::kFloat32:
      return read(float());
    case Dtype::kBFloat16:
      return to_float(read(BFloat16()));
    case Dtype::kFloat16:
      return to_float(read(Float16()));
    default:
      return 0;
  }
}

std::string hexadecimal(const std::byte* from, std::size_t size) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, from, size);
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(bits));
  return text;
}

}  // namespace

TrialMemory::TrialMemory(const Driver& driver, std::size_t bytes) : driver_(driver) {
  driver.check(driver.create_stream(&stream_, cuda::kNonBlocking), "making a stream for a trial");
  const cuda::Result result = driver.allocate(&memory_, bytes);
  if (result != 0) driver.destroy_stream(stream_);
  driver.check(result, "taking " + std::to_string(bytes >> 10) + " KiB for a trial");
}

TrialMemory::~TrialMemory() {
  driver_.wait(stream_);
  driver_.release(memory_);
  driver_.destroy_stream(stream_);
}

void TrialMemory::upload(const std::vector<std::byte>& from) const {
  const char* const what = "copying to the GPU";
  driver_.check(driver_.copy_to_device(memory_, from.data(), from.size(), stream_), what);
  // Whether the driver has read it all when it returns depends on the machine.
  driver_.check(driver_.wait(stream_), what);
}

void TrialMemory::download(std::vector<std::byte>* to) const {
  driver_.check(driver_.copy_to_host(to->data(), memory_, to->size(), stream_),
                "copying from the GPU");
  driver_.check(driver_.wait(stream_), "a trial");
}

std::uint32_t Trial::random() {
  random_ = random_ * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>(random_ >> 33);
}

std::size_t Trial::add_zeros(std::size_t bytes, const std::string& name) {
  const std::size_t at = (host_.size() + kAlignment - 1) / kAlignment * kAlignment;
  host_.resize(at, kUntouched);
  host_.resize(at + bytes);
  gaps_.push_back(host_.size());
  host_.resize(at + bytes + kGap, kUntouched);
  if (!name.empty()) {
    tensors_.push_back({at, Dtype::kFloat32, static_cast<std::int64_t>(bytes / 4), name});
  }
  return at;
}

std::size_t Trial::add(Dtype dtype, std::int64_t numel, int shift, const std::string& name) {
  const std::size_t size = itemsize(dtype), bytes = static_cast<std::size_t>(numel) * size;
  const std::size_t offset = static_cast<std::size_t>(shift) * size;
  const std::size_t at = add_zeros(offset + bytes) + offset;
  std::fill(host_.begin() + static_cast<std::ptrdiff_t>(at - offset),
            host_.begin() + static_cast<std::ptrdiff_t>(at), kUntouched);
  for (std::size_t i = 0; i < bytes; i += size) {
    std::byte* const to = host_.data() + at + i;
    const auto put = [&](auto value) { std::memcpy(to, &value, sizeof(value)); };
    // From 2 down to what a float just holds, and now and then nothing.
    const std::uint32_t kind = random() % 64;
    const double scale = kind == 0 ? 0 : kind == 1 ? 1e-39 : kind < 8 ? 1e-4 : 1;
    const double value = (random() / 1073741824.0 - 1) * 2 * scale;
    switch (dtype) {
      case Dtype::kFloat64:
        put(value);
        break;
      case Dtype::kFloat32:
        put(static_cast<float>(value));
        break;
      case Dtype::kBFloat16:
        put(to_bfloat16(static_cast<float>(value)));
        break;
      case Dtype::kFloat16:
        put(to_float16(static_cast<float>(value)));
        break;
      case Dtype::kInt8:
        put(static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127));
        break;
      case Dtype::kUInt8:
        put(static_cast<std::uint8_t>(random()));
        break;
      case Dtype::kInt16:
        put(static_cast<std::int16_t>(random()));
        break;
      case Dtype::kInt64:
        put(static_cast<std::int64_t>(random()));
        break;
    }
  }
  tensors_.push_back({at, dtype, numel, name});
  return at;
}

void Trial::make_magnitudes(std::size_t place) {
  for (const Tensor& tensor : tensors_) {
    if (tensor.at != place) continue;
    const std::size_t size = itemsize(tensor.dtype);
    for (std::int64_t i = 0; i < tensor.numel; ++i) {  // the sign is the last bit of the last byte
      host_[place + static_cast<std::size_t>(i + 1) * size - 1] &= std::byte{0x7F};
    }
  }
}

std::string Trial::difference(const std::vector<std::byte>& found, double tolerance) const {
  for (const Tensor& tensor : tensors_) {
    const std::size_t size = itemsize(tensor.dtype);
    std::int64_t differ = 0, first = -1;
    for (std::int64_t i = 0; i < tensor.numel; ++i) {
      const std::size_t at = tensor.at + static_cast<std::size_t>(i) * size;
      if (std::memcmp(host_.data() + at, found.data() + at, size) == 0) continue;
      const double here = value_at(host_.data() + at, tensor.dtype);
      const double there = value_at(found.data() + at, tensor.dtype);
      if (std::isnan(here) && std::isnan(there)) continue;
      const double larger = std::max({std::fabs(here), std::fabs(there), 1.0});
      if (std::fabs(here - there) <= tolerance * larger && tolerance > 0) continue;
      if (differ++ == 0) first = i;
    }
    if (differ == 0) continue;
    const std::size_t at = tensor.at + static_cast<std::size_t>(first) * size;
    return "on this GPU it differs from the CPU in " + std::to_string(differ) + " of " +
           std::to_string(tensor.numel) + " elements of " + tensor.name + ", the first of them " +
           std::to_string(first) + ": " + hexadecimal(found.data() + at, size) + " instead of " +
           hexadecimal(host_.data() + at, size);
  }
  for (const std::size_t gap : gaps_) {
    if (!std::equal(host_.begin() + static_cast<std::ptrdiff_t>(gap),
                    host_.begin() + static_cast<std::ptrdiff_t>(gap + kGap),
                    found.begin() + static_cast<std::ptrdiff_t>(gap))) {
      return "on this GPU it writes behind the end of a tensor";
    }
  }
  return "";
}

}  // namespace fusedopt
