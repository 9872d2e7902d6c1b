#pragma once

// Reads torch's own tensor objects, of which no header is included: where in them a word lies is
// learned from tensors of which everything is known, when the module is imported. A word is trusted
// only if one single place has it in every sample (fusedopt/torch_layout.py takes the samples, moves
// them, and compares again); a word that was not found is asked of Python instead, which is slower.
//
//   PyObject of a tensor -> TensorImpl -> StorageImpl -> memory
//                             \-> dispatch keys: one bit says that it is negated lazily
//                             \-> version counter (to fetch it ahead of time, nothing else)

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fusedopt {

// Bytes that every TensorImpl and StorageImpl has, in torch 2.13. Nothing beyond them is read.
constexpr std::size_t kTensorImplBytes = 176, kStorageImplBytes = 56;

// A tensor of which everything is known.
struct LayoutSample {
  const char* object;
  std::size_t object_bytes;
  const char* impl;
  const char* storage;
  std::uint64_t memory, num_bytes;  // of the storage
  bool negative;                    // negated lazily
};

// Where words lie, in bytes from the beginning of their object; 0 where that is not known.
struct TorchLayout {
  std::size_t impl = 0;                            // in the PyObject
  std::size_t storage = 0, keys = 0, version = 0;  // in the TensorImpl
  std::uint64_t negative = 0;                      // the bit of the keys
  std::size_t memory = 0, num_bytes = 0;           // in the StorageImpl

  // Whether a tensor is the same as long as its words are: see TensorWords.
  bool trusts_words = false;

  bool knows_memory() const { return impl != 0 && storage != 0 && memory != 0 && num_bytes != 0; }
  bool knows_negative() const { return impl != 0 && keys != 0; }
};

// The words of a tensor's objects as they were when the tensor was looked at. Whatever moves it, or
// makes another tensor of it, changes one of them: equal words, equal tensor, and nobody need be
// asked. They are all that a TensorImpl has behind its reference count, and what its storage says of
// its memory. Sizes of more dimensions than kInlineDims stand elsewhere.
class TensorWords {
 public:
  static constexpr int kInlineDims = 5;

  void remember(const TorchLayout& layout, const char* impl, int ndim);
  void forget() { storage_ = nullptr; }
  bool are_those_of(const char* impl) const {
    return storage_ != nullptr &&
           std::memcmp(impl_words_, impl + kHead, sizeof(impl_words_)) == 0 &&
           std::memcmp(storage_words_, storage_ + kHead, sizeof(storage_words_)) == 0;
  }

 private:
  static constexpr std::size_t kHead = 16;  // virtual table and reference count
  const char* storage_ = nullptr;           // the implementation's words have it, too
  char impl_words_[kTensorImplBytes - kHead];
  char storage_words_[kStorageImplBytes - kHead];
};

// The first two samples share storage and version counter; no other sample has these.
TorchLayout learn_layout(const std::vector<LayoutSample>& samples);

// A word at an offset of an object.
inline std::uint64_t word_at(const void* object, std::size_t offset) {
  std::uint64_t word;
  std::memcpy(&word, static_cast<const char*>(object) + offset, sizeof(word));
  return word;
}
inline const char* pointer_at(const void* object, std::size_t offset) {
  return reinterpret_cast<const char*>(static_cast<std::uintptr_t>(word_at(object, offset)));
}

}  // namespace fusedopt
