#include "cache_warmer.h"

#include "torch.h"

namespace fusedopt {

namespace {

void touch(const char* address) { (void)*const_cast<const volatile char*>(address); }

const char* part_of(const char* impl, std::size_t offset) {
  return offset == 0 ? nullptr : pointer_at(impl, offset);
}

}  // namespace

void fetch_versions(const char* const* impls, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const char* const counter = pointer_at(impls[i], torch.layout.version);
    if (counter != nullptr) touch(counter);
  }
}

void fetch_impls(const char* const* impls, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (impls[i] == nullptr) continue;
    for (std::size_t at = 0; at < kTensorImplBytes; at += 64) touch(impls[i] + at);
    touch(impls[i] + kTensorImplBytes - 1);
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (impls[i] == nullptr) continue;
    const char* const storage = part_of(impls[i], torch.layout.storage);
    const char* const version = part_of(impls[i], torch.layout.version);
    // Both may lie across two lines. (Without the second one of storages, 1,000 small tensors of Adam
    // that are in no near cache take 0.86 us each instead of 0.75.)
    if (storage != nullptr) touch(storage), touch(storage + kStorageImplBytes - 1);
    if (version != nullptr) touch(version), touch(version + kVersionCounterBytes - 1);
  }
}

void fetch(const Seen* block, std::size_t size, Roles roles) {
  if (torch.layout.impl == 0) return;
  const char* impls[kBlock * kNumRoles];
  std::size_t count = 0;
  for (std::size_t i = 0; i < size; ++i) {
    roles.for_each([&](Role role) {
      PyObject* const tensor = block[i][role];
      if (tensor != nullptr && is_plain_tensor(tensor)) impls[count++] = impl_of(tensor);
    });
  }
  fetch_impls(impls, count);
}

}  // namespace fusedopt
