#pragma once

// Reads torch's own tensor objects, of which no header is included: where in them a word lies is
// learned from tensors of which everything is known, when the module is imported. A word is trusted
// only if one single place has it in every sample (fusedopt/torch_layout.py takes the samples, moves
// them, and compares again); a word that was not found is asked of Python instead, which is slower.
//
//   PyObject of a tensor -> TensorImpl -> StorageImpl -> memory
//                             \-> dispatch keys: one bit says that it is negated lazily
//                             |-> version counter, the one word that is written, too
//                             \-> what autograd knows of it -> TensorImpl of its gradient

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fusedopt {

// Bytes that every TensorImpl and StorageImpl has, in torch 2.13. Nothing beyond them is read.
constexpr std::size_t kTensorImplBytes = 176, kStorageImplBytes = 56;
constexpr std::size_t kVersionCounterBytes = 24, kAutogradMetaBytes = 64;

// A tensor of which everything is known.
struct LayoutSample {
  const char* object;
  std::size_t object_bytes;
  const char* impl;
  const char* storage;
  std::uint64_t memory, num_bytes;  // of the storage
  bool negative;                    // negated lazily
  std::uint32_t version;
};

// A leaf that has a gradient, and a tensor like it of which autograd knows nothing.
struct GradientSample {
  const char *leaf, *grad, *other;
};

// Where words lie, in bytes from the beginning of their object; 0 where that is not known.
struct TorchLayout {
  std::size_t impl = 0;                            // in the PyObject
  std::size_t storage = 0, keys = 0, version = 0;  // in the TensorImpl
  std::uint64_t negative = 0;                      // the bit of the keys
  std::size_t memory = 0, num_bytes = 0;           // in the StorageImpl
  std::size_t count = 0;                           // in the version counter
  std::size_t object = 0, autograd = 0;            // in the TensorImpl
  std::size_t grad = 0;                            // in what autograd knows of it

  // Whether a tensor is the same as long as its words are: see TensorWords.
  bool trusts_words = false;

  bool knows_memory() const { return impl != 0 && storage != 0 && memory != 0 && num_bytes != 0; }
  bool knows_negative() const { return impl != 0 && keys != 0; }
  bool knows_version() const { return impl != 0 && version != 0 && count != 0; }
  bool knows_gradient() const { return impl != 0 && object != 0 && autograd != 0 && grad != 0; }
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
void learn_gradients(const std::vector<GradientSample>& samples, TorchLayout* layout);

// A word at an offset of an object.
inline std::uint64_t word_at(const void* object, std::size_t offset) {
  std::uint64_t word;
  std::memcpy(&word, static_cast<const char*>(object) + offset, sizeof(word));
  return word;
}
inline std::uint32_t half_word_at(const void* object, std::size_t offset) {
  std::uint32_t half;
  std::memcpy(&half, static_cast<const char*>(object) + offset, sizeof(half));
  return half;
}
inline const char* pointer_at(const void* object, std::size_t offset) {
  return reinterpret_cast<const char*>(static_cast<std::uintptr_t>(word_at(object, offset)));
}

}  // namespace fusedopt
