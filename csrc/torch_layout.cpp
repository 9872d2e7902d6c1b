#include "torch_layout.h"

#include <algorithm>
#include <cstring>

namespace fusedopt {

namespace {

constexpr std::size_t kWord = sizeof(std::uint64_t);

// The only offset at which `fits` finds in all samples what it looks for, or 0.
template <typename Fits>
std::size_t only_offset(std::size_t begin, std::size_t end, const Fits& fits,
                        std::size_t word = kWord) {
  std::size_t found = 0;
  for (std::size_t at = begin; at + word <= end; at += word) {
    if (!fits(at)) continue;
    if (found != 0) return 0;
    found = at;
  }
  return found;
}

void read_kind(const char* impl, const char* storage, std::uint64_t (&words)[kKindWords]) {
  constexpr std::size_t kInStorage = 2 * kWord, kInImpl = kKindWords * kWord - kInStorage;
  std::memcpy(words, impl + kTensorImplBytes - kInImpl, kInImpl);
  std::memcpy(words + kKindWords - 2, storage + kStorageImplBytes - kInStorage, kInStorage);
}

}  // namespace

void TensorWords::remember(const TorchLayout& layout, const char* impl, int ndim,
                           TensorKinds* kinds) {
  forget();
  if (!layout.trusts_words || ndim > kInlineDims) return;
  storage_ = pointer_at(impl, layout.storage);
  if (storage_ == nullptr) return;
  TensorKind kind;
  read_kind(impl, storage_, kind.words);
  for (int k = 0; k < kKindWords; ++k) {
    kind.counts[k] = layout.counts[ndim][k];
    kind.words[k] &= kind.counts[k];
  }
  kind_ = kinds->find(kind);
  std::memcpy(impl_words_, impl + kHead, sizeof(impl_words_));
  std::memcpy(storage_words_, storage_ + kHead, sizeof(storage_words_));
}

bool TensorWords::move_to(const TorchLayout& layout, const char* impl, std::ptrdiff_t* distance) {
  if (kind_ == nullptr || !layout.knows_places()) return false;
  for (int i = 0; i < kImplWords; ++i) {
    const std::size_t at = kHead + i * kWord;
    const bool is_place = at == layout.storage || at == layout.version || at == layout.object;
    if (!is_place && word_at(impl, at) != impl_words_[i]) return false;
  }
  const char* const storage = pointer_at(impl, layout.storage);
  if (storage == nullptr || difference_of_kind(impl, storage) != 0) return false;
  const std::uint64_t memory = word_at(storage, layout.memory);
  const std::uint64_t before = storage_words_[(layout.memory - kHead) / kWord];
  if ((memory == 0) != (before == 0)) return false;
  for (int i = 0; i < kStorageWords; ++i) {
    // What owns the memory may be the memory itself.
    const std::uint64_t now = word_at(storage, kHead + i * kWord);
    if (now != storage_words_[i] && (storage_words_[i] != before || now != memory)) return false;
  }
  *distance = static_cast<std::ptrdiff_t>(memory - before);
  storage_ = storage;
  std::memcpy(impl_words_, impl + kHead, sizeof(impl_words_));
  std::memcpy(storage_words_, storage + kHead, sizeof(storage_words_));
  return true;
}

void learn_counts(const std::vector<LayoutSample>& samples, int ndim, TorchLayout* layout) {
  if (samples.empty() || ndim > kInlineDims) return;
  std::uint64_t first[kKindWords], other[kKindWords];
  read_kind(samples[0].impl, samples[0].storage, first);
  for (const LayoutSample& sample : samples) {
    read_kind(sample.impl, sample.storage, other);
    for (int k = 0; k < kKindWords; ++k) layout->counts[ndim][k] &= ~(first[k] ^ other[k]);
  }
}

TorchLayout learn_layout(const std::vector<LayoutSample>& samples) {
  TorchLayout layout;
  if (sizeof(void*) != kWord || samples.size() < 3) return layout;
  const auto in_all = [&](const auto& fits) {
    return [&samples, fits](std::size_t at) {
      return std::all_of(samples.begin(), samples.end(),
                         [&](const LayoutSample& sample) { return fits(sample, at); });
    };
  };
  const auto address = [](const char* object) { return reinterpret_cast<std::uintptr_t>(object); };

  std::size_t object_bytes = samples[0].object_bytes;
  for (const LayoutSample& s : samples) object_bytes = std::min(object_bytes, s.object_bytes);
  layout.impl = only_offset(kWord, object_bytes, in_all([&](const LayoutSample& s, std::size_t at) {
                              return word_at(s.object, at) == address(s.impl);
                            }));
  layout.storage =
      only_offset(kWord, kTensorImplBytes, in_all([&](const LayoutSample& s, std::size_t at) {
                    return word_at(s.impl, at) == address(s.storage);
                  }));
  layout.memory =
      only_offset(kWord, kStorageImplBytes, in_all([](const LayoutSample& s, std::size_t at) {
                    return s.memory == 0 || word_at(s.storage, at) == s.memory;
                  }));
  layout.num_bytes =
      only_offset(kWord, kStorageImplBytes, in_all([](const LayoutSample& s, std::size_t at) {
                    return word_at(s.storage, at) == s.num_bytes;
                  }));

  // The bits that all negated tensors have, and no other.
  const auto negative_bits = [&](std::size_t at) {
    std::uint64_t in_negated = ~std::uint64_t{0}, in_others = 0;
    for (const LayoutSample& s : samples) {
      if (s.negative) {
        in_negated &= word_at(s.impl, at);
      } else {
        in_others |= word_at(s.impl, at);
      }
    }
    return in_negated & ~in_others;
  };
  layout.keys =
      only_offset(kWord, kTensorImplBytes, [&](std::size_t at) { return negative_bits(at) != 0; });
  if (layout.keys != 0) layout.negative = negative_bits(layout.keys);
  if ((layout.negative & (layout.negative - 1)) != 0) layout.keys = layout.negative = 0;

  layout.version = only_offset(kWord, kTensorImplBytes, [&](std::size_t at) {
    const std::uint64_t counter = word_at(samples[0].impl, at);
    if (at == layout.storage || counter % kWord != 0) return false;
    return counter == word_at(samples[1].impl, at) &&
           std::none_of(samples.begin() + 2, samples.end(),
                        [&](const LayoutSample& s) { return word_at(s.impl, at) == counter; });
  });
  layout.object =
      only_offset(kWord, kTensorImplBytes, in_all([&](const LayoutSample& s, std::size_t at) {
                    return word_at(s.impl, at) == address(s.object);
                  }));

  if (layout.version == 0) return layout;
  const auto has_version = [&](const LayoutSample& s, std::size_t at) {
    const char* const counter = pointer_at(s.impl, layout.version);
    return counter != nullptr && half_word_at(counter, at) == s.version;
  };
  layout.count = only_offset(kWord, kVersionCounterBytes, in_all(has_version), kWord / 2);
  return layout;
}

void learn_gradients(const std::vector<GradientSample>& samples, TorchLayout* layout) {
  const auto in_all = [&](const auto& fits) {
    return [&samples, fits](std::size_t at) {
      return std::all_of(samples.begin(), samples.end(),
                         [&](const GradientSample& sample) { return fits(sample, at); });
    };
  };
  // Only leaves have it.
  layout->autograd =
      only_offset(kWord, kTensorImplBytes, in_all([](const GradientSample& s, std::size_t at) {
                    const std::uint64_t known = word_at(s.leaf, at);
                    return known != 0 && known % kWord == 0 && word_at(s.other, at) == 0 &&
                           word_at(s.without, at) != 0;
                  }));
  if (layout->autograd == 0) return;
  layout->grad =
      only_offset(kWord, kAutogradMetaBytes, in_all([&](const GradientSample& s, std::size_t at) {
                    return pointer_at(pointer_at(s.leaf, layout->autograd), at) == s.grad;
                  }));
  if (layout->grad == 0) return;
  const auto none_of = [&](const GradientSample& s) {
    return pointer_at(pointer_at(s.without, layout->autograd), layout->grad);
  };
  layout->no_gradient = none_of(samples[0]);
  const bool is_one = std::all_of(samples.begin(), samples.end(), [&](const GradientSample& s) {
    return none_of(s) == layout->no_gradient;
  });
  if (!is_one) layout->grad = 0;
}

}  // namespace fusedopt
