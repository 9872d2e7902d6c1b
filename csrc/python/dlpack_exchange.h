#pragma once

// The part of the public DLPack 1.x ABI (https://dmlc.github.io/dlpack) that fusedopt calls: a
// table of C functions that torch (2.10 and newer) exports as a capsule on torch.Tensor.

#include <cstdint>

namespace fusedopt::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

// Borrowed: valid while the tensor is alive and unchanged.
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // 0, or -1 with a Python exception set. Fills in place, allocates nothing.
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

inline constexpr char kCapsuleName[] = "dlpack_exchange_api";

}  // namespace fusedopt::dlpack
