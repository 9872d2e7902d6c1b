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

}  // namespace

void TensorWords::remember(const TorchLayout& layout, const char* impl, int ndim) {
  forget();
  if (!layout.trusts_words || ndim > kInlineDims) return;
  storage_ = pointer_at(impl, layout.storage);
  if (storage_ == nullptr) return;
  std::memcpy(impl_words_, impl + kHead, sizeof(impl_words_));
  std::memcpy(storage_words_, storage_ + kHead, sizeof(storage_words_));
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
                    return known != 0 && known % kWord == 0 && word_at(s.other, at) == 0;
                  }));
  if (layout->autograd == 0) return;
  layout->grad =
      only_offset(kWord, kAutogradMetaBytes, in_all([&](const GradientSample& s, std::size_t at) {
                    return pointer_at(pointer_at(s.leaf, layout->autograd), at) == s.grad;
                  }));
}

}  // namespace fusedopt
