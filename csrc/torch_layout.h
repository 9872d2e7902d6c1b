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
#include <set>
#include <vector>

namespace fusedopt {

// Bytes that every TensorImpl and StorageImpl has, in torch 2.13. Nothing beyond them is read.
constexpr std::size_t kTensorImplBytes = 176, kStorageImplBytes = 56;
// Behind the virtual table and the reference count come words among which addresses are, so many, and
// behind these what kind of tensor it is.
constexpr std::size_t kHead = 16;
constexpr int kImplWords = 6, kStorageWords = 3;
constexpr int kKindWords = 14 + 2;
constexpr int kInlineDims = 5;
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

// A leaf that has a gradient, one that has none, and a tensor of which autograd knows nothing.
struct GradientSample {
  const char *leaf, *grad, *without, *other;
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
  const char* no_gradient = nullptr;               // what is there if there is none

  // Whether a tensor is the same as long as its words are: see TensorWords.
  bool trusts_words = false;
  // The bits of a kind that say something, by the number of dimensions: nobody sets the others, such as
  // those between two members.
  std::uint64_t counts[kInlineDims + 1][kKindWords];
  TorchLayout() { std::memset(counts, 0xFF, sizeof(counts)); }

  bool knows_memory() const { return impl != 0 && storage != 0 && memory != 0 && num_bytes != 0; }
  // Whether what differs between two tensors of a kind is known.
  bool knows_places() const {
    const auto is_in = [](std::size_t at, int words) {
      return at >= kHead && at < kHead + words * sizeof(std::uint64_t);
    };
    return is_in(storage, kImplWords) && is_in(version, kImplWords) && is_in(object, kImplWords) &&
           is_in(memory, kStorageWords);
  }
  bool knows_negative() const { return impl != 0 && keys != 0; }
  bool knows_version() const { return impl != 0 && version != 0 && count != 0; }
  bool knows_gradient() const { return impl != 0 && object != 0 && autograd != 0 && grad != 0; }
};

// The first two samples share storage and version counter; no other sample has these.
TorchLayout learn_layout(const std::vector<LayoutSample>& samples);
// Tensors of one kind, of so many dimensions, made where there was other memory before.
void learn_counts(const std::vector<LayoutSample>& samples, int ndim, TorchLayout* layout);
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

// What a tensor is, wherever it lies: the words of its objects that are no addresses. Tensors of one
// kind share it.
struct TensorKind {
  std::uint64_t words[kKindWords];
  std::uint64_t counts[kKindWords];  // see TorchLayout::counts
};

class TensorKinds {
 public:
  // Stays where it is until these are cleared.
  const TensorKind* find(const TensorKind& kind) { return &*kinds_.insert(kind).first; }
  std::size_t size() const { return kinds_.size(); }
  void clear() { kinds_.clear(); }

 private:
  struct IsLess {
    bool operator()(const TensorKind& a, const TensorKind& b) const {
      return std::memcmp(&a, &b, sizeof(a)) < 0;
    }
  };
  std::set<TensorKind, IsLess> kinds_;
};

// The words of a tensor's objects as they were when the tensor was looked at. Whatever moves it, or
// makes another tensor of it, changes one of them: equal words, equal tensor, and nobody need be
// asked. They are all that a TensorImpl has behind its reference count, and what its storage says of
// its memory. Sizes of more dimensions than kInlineDims stand elsewhere.
class TensorWords {
 public:
  void remember(const TorchLayout& layout, const char* impl, int ndim, TensorKinds* kinds);
  void forget() { kind_ = nullptr; }
  bool are_those_of(const char* impl) const {
    return kind_ != nullptr && difference(impl + kHead, impl_words_, kImplWords) == 0 &&
           (difference(storage_ + kHead, storage_words_, kStorageWords) |
            difference_of_kind(impl, storage_)) == 0;
  }
  // Whether a tensor is another one of the same kind, with as much memory elsewhere. Then these are its
  // words, and its elements are so many bytes further on.
  bool move_to(const TorchLayout& layout, const char* impl, std::ptrdiff_t* distance);

 private:
  std::uint64_t difference_of_kind(const char* impl, const char* storage) const {
    constexpr int kInImpl = kKindWords - 2;
    const char* const of_impl = impl + kTensorImplBytes - kInImpl * sizeof(std::uint64_t);
    const char* const of_storage = storage + kStorageImplBytes - 2 * sizeof(std::uint64_t);
    std::uint64_t found = 0;
    for (int i = 0; i < kInImpl; ++i) {
      found |= (word_at(of_impl, i * sizeof(found)) ^ kind_->words[i]) & kind_->counts[i];
    }
    for (int i = 0; i < 2; ++i) {
      const int k = kInImpl + i;
      found |= (word_at(of_storage, i * sizeof(found)) ^ kind_->words[k]) & kind_->counts[k];
    }
    return found;
  }
  static std::uint64_t difference(const char* object, const std::uint64_t* words, int count) {
    std::uint64_t found = 0;
    for (int i = 0; i < count; ++i) found |= word_at(object, i * sizeof(found)) ^ words[i];
    return found;
  }

  const TensorKind* kind_ = nullptr;
  const char* storage_ = nullptr;  // the implementation's words have it, too
  std::uint64_t impl_words_[kImplWords];
  std::uint64_t storage_words_[kStorageWords];
};

}  // namespace fusedopt
