#pragma once

// What one block of the device does, as ordinary functions of the table and of the indices of block
// and thread. Kernels are made of them (update_on_device.h); the tests run them on the CPU, over all
// blocks and threads.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../storage/half.h"
#include "../update_rules/host_device.h"
#include "device_scalars.h"
#include "launch_table.h"
#include "tuning.h"

#if defined(FUSEDOPT_KERNELS_ON_HOST)
#include <stdexcept>
#endif
#if defined(__CUDACC__)
#define FUSEDOPT_UNROLL _Pragma("unroll")
#else
#define FUSEDOPT_UNROLL
#endif

namespace fusedopt {

// Memory -------------------------------------------------------------------------------------

// What one thread moves at a time.
template <int kBytes>
struct alignas(kBytes) Bytes {
  using Word = std::conditional_t<(kBytes < 4), std::uint16_t, std::uint32_t>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Word words[kWords];
};

// What would be a misaligned address on the device is an error on the host, too.
template <int kBytes>
FUSEDOPT_HD void check_alignment([[maybe_unused]] const void* address) {
#if defined(FUSEDOPT_KERNELS_ON_HOST)
  if (reinterpret_cast<std::uintptr_t>(address) % kBytes != 0) {
    throw std::logic_error("a kernel reads or writes a misaligned address");
  }
#endif
}

// Whether what is read is read again soon. Else the hints of loads, and of all stores, keep it from
// pushing what the next forward needs out of the cache.
enum class Reads { kOnce, kAgain };

template <int kBytes, Reads kReads = Reads::kOnce>
FUSEDOPT_HD Bytes<kBytes> load_bytes(const void* from) {
  Bytes<kBytes> bytes;
#if defined(__CUDA_ARCH__)
  using Word = std::conditional_t<(kBytes > 4), std::conditional_t<kBytes == 16, uint4, uint2>,
                                  std::conditional_t<kBytes == 4, unsigned int, unsigned short>>;
  const auto* const word = static_cast<const Word*>(from);
  const Word value = kReads == Reads::kOnce ? __ldcs(word) : __ldcg(word);
  std::memcpy(&bytes, &value, kBytes);
#else
  check_alignment<kBytes>(from);
  std::memcpy(&bytes, from, kBytes);
#endif
  return bytes;
}

template <int kBytes>
FUSEDOPT_HD void store_bytes(void* to, const Bytes<kBytes>& bytes) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16) {
    __stcs(static_cast<uint4*>(to),
           make_uint4(bytes.words[0], bytes.words[1], bytes.words[2], bytes.words[3]));
  } else if constexpr (kBytes == 8) {
    __stcs(static_cast<uint2*>(to), make_uint2(bytes.words[0], bytes.words[1]));
  } else if constexpr (kBytes == 4) {
    __stcs(static_cast<unsigned int*>(to), bytes.words[0]);
  } else {
    __stcs(static_cast<unsigned short*>(to), bytes.words[0]);
  }
#else
  check_alignment<kBytes>(to);
  std::memcpy(to, &bytes, kBytes);
#endif
}

// Elements -----------------------------------------------------------------------------------

FUSEDOPT_HD float half_to_float(std::uint16_t bits, BFloat16) { return to_float(BFloat16{bits}); }
FUSEDOPT_HD float half_to_float(std::uint16_t bits, Float16) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return to_float(Float16{bits});
#endif
}

// Two at a time: the GPU has an instruction for it. It writes a NaN as 0x7FFF, the CPU as 0x7FC0.
FUSEDOPT_HD std::uint32_t pack_halves(float low, float high, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return to_bfloat16(low).bits | static_cast<std::uint32_t>(to_bfloat16(high).bits) << 16;
#endif
}
FUSEDOPT_HD std::uint32_t pack_halves(float low, float high, Float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#elif defined(__CUDA_ARCH__)
  std::uint16_t low_bits, high_bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(low_bits) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(high_bits) : "f"(high));
  return low_bits | static_cast<std::uint32_t>(high_bits) << 16;
#else
  return to_float16(low).bits | static_cast<std::uint32_t>(to_float16(high).bits) << 16;
#endif
}

// kVector elements of one dtype, as they are in memory and as numbers. What is in `bytes` beyond
// them is left alone.
template <typename Element, int kVector, int kBytes, typename T>
FUSEDOPT_HD void unpack(const Bytes<kBytes>& bytes, T (&values)[kVector]) {
  if constexpr (sizeof(Element) >= 4) {
    std::memcpy(values, &bytes, sizeof(values));
  } else if constexpr (kVector == 1) {
    values[0] = half_to_float(static_cast<std::uint16_t>(bytes.words[0]), Element());
  } else {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kVector / 2; ++i) {
      values[2 * i] = half_to_float(static_cast<std::uint16_t>(bytes.words[i]), Element());
      values[2 * i + 1] =
          half_to_float(static_cast<std::uint16_t>(bytes.words[i] >> 16), Element());
    }
  }
}

template <typename Element, int kVector, int kBytes, typename T>
FUSEDOPT_HD void pack(const T (&values)[kVector], Bytes<kBytes>* bytes) {
  if constexpr (sizeof(Element) >= 4) {
    std::memcpy(bytes, values, sizeof(values));
  } else if constexpr (kVector == 1) {
    const std::uint32_t bits = pack_halves(values[0], values[0], Element());
    bytes->words[0] = static_cast<typename Bytes<kBytes>::Word>(bits & 0xFFFFu);
  } else {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kVector / 2; ++i) {
      bytes->words[i] = pack_halves(values[2 * i], values[2 * i + 1], Element());
    }
  }
}

// How slots are read and written: all of one dtype, known to the compiler ...
template <typename Element, int kVectorElements, Reads kReads = Reads::kOnce>
struct OneDtype {
  static constexpr int kVector = kVectorElements;
  static constexpr int kBytes = kVector * static_cast<int>(sizeof(Element));
  using Raw = Bytes<kBytes>;

  FUSEDOPT_HD Raw load(int, const void* slot, std::uint32_t at) const {
    return load_bytes<kBytes, kReads>(static_cast<const char*>(slot) + at * sizeof(Element));
  }
  FUSEDOPT_HD void store(int, void* slot, std::uint32_t at, const Raw& raw) const {
    store_bytes(static_cast<char*>(slot) + at * sizeof(Element), raw);
  }
  template <typename T>
  FUSEDOPT_HD void unpack(int, const Raw& raw, T (&values)[kVector]) const {
    fusedopt::unpack<Element>(raw, values);
  }
  template <typename T>
  FUSEDOPT_HD void pack(int, const T (&values)[kVector], Raw* raw) const {
    fusedopt::pack<Element>(values, raw);
  }
};

// ... or each of its own, any of those that are computed in float.
template <int kVectorElements, Reads kReads = Reads::kOnce>
struct AnyDtype {
  static constexpr int kVector = kVectorElements;
  using Raw = Bytes<4 * kVector>;
  using Half = Bytes<2 * kVector>;
  TensorInfo info;

  FUSEDOPT_HD Raw load(int slot, const void* data, std::uint32_t at) const {
    if (info.dtype(slot) == Dtype::kFloat32) {
      return load_bytes<4 * kVector, kReads>(static_cast<const char*>(data) + at * 4);
    }
    const Half half = load_bytes<2 * kVector, kReads>(static_cast<const char*>(data) + at * 2);
    Raw raw = {};
    FUSEDOPT_UNROLL
    for (int i = 0; i < Half::kWords; ++i) raw.words[i] = half.words[i];
    return raw;
  }
  FUSEDOPT_HD void store(int slot, void* data, std::uint32_t at, const Raw& raw) const {
    if (info.dtype(slot) == Dtype::kFloat32) {
      return store_bytes(static_cast<char*>(data) + at * 4, raw);
    }
    Half half;
    FUSEDOPT_UNROLL
    for (int i = 0; i < Half::kWords; ++i) {
      half.words[i] = static_cast<typename Half::Word>(raw.words[i]);
    }
    store_bytes(static_cast<char*>(data) + at * 2, half);
  }
  FUSEDOPT_HD void unpack(int slot, const Raw& raw, float (&values)[kVector]) const {
    switch (info.dtype(slot)) {
      case Dtype::kBFloat16:
        return fusedopt::unpack<BFloat16>(raw, values);
      case Dtype::kFloat16:
        return fusedopt::unpack<Float16>(raw, values);
      default:
        return fusedopt::unpack<float>(raw, values);
    }
  }
  FUSEDOPT_HD void pack(int slot, const float (&values)[kVector], Raw* raw) const {
    switch (info.dtype(slot)) {
      case Dtype::kBFloat16:
        return fusedopt::pack<BFloat16>(values, raw);
      case Dtype::kFloat16:
        return fusedopt::pack<Float16>(values, raw);
      default:
        return fusedopt::pack<float>(values, raw);
    }
  }
};

// The block ----------------------------------------------------------------------------------

// What a block has to do: part of one tensor. Found by one thread, shared by all.
template <typename Update>
struct BlockTask {
  static constexpr int kSlots = 2 + Update::kNumStates;
  void* slots[kSlots];  // at the first element of the block
  std::uint32_t count;
  TensorInfo info;
  bool skip;
  Update update;
};

// Prepares the update from the scalars on the device, which it returns as they are in this step.
template <typename T, typename Rule, typename Update>
FUSEDOPT_HD Scalars prepare_on_device(const LaunchTable& table, std::uint32_t t,
                                      BlockTask<Update>* task) {
  const Rule& rule = *static_cast<const Rule*>(table.update(task->info.update()));
  Scalars scalars = task->info.first_step() ? 1 : 2;
  if constexpr (kNumScalars<Rule> > 0) {
    scalars = read_scalars(rule, table.pointers(t) + BlockTask<Update>::kSlots);
  }
  rule.template prepare<T>(scalars, [&](const auto& update) {
    if constexpr (std::is_same_v<std::decay_t<decltype(update)>, Update>) task->update = update;
  });
  return scalars;
}

template <typename T, typename Rule, typename Update>
FUSEDOPT_HD Scalars begin_block(const LaunchTable& table, std::uint32_t block,
                                BlockTask<Update>* task) {
  const std::uint32_t t = table.tensor_of(block);
  const std::int64_t begin =
      static_cast<std::int64_t>(block - table.first_chunk(t)) * kBlockElements;
  const std::int64_t left = table.numel(t) - begin;
  task->count = static_cast<std::uint32_t>(left < kBlockElements ? left : kBlockElements);
  task->info = TensorInfo{table.info(t)};
  task->skip = table.scaling.skip();
  Scalars scalars;
  if (table.on_device) {
    scalars = prepare_on_device<T, Rule>(table, t, task);
  } else {
    task->update = *static_cast<const Update*>(table.update(task->info.update()));
  }
  task->update.penalized_grad.grad_factor *= static_cast<T>(table.scaling.grad_factor());
  void* const* const pointers = table.pointers(t);
  FUSEDOPT_UNROLL
  for (int s = 0; s < BlockTask<Update>::kSlots; ++s) {
    const std::int64_t bytes = begin * static_cast<std::int64_t>(itemsize(task->info.dtype(s)));
    task->slots[s] = static_cast<char*>(pointers[s]) + bytes;
  }
  return scalars;
}

// The block of the tensor that is the last to have read its scalars moves them on. After the other
// threads have been let go: they need not wait for the ticket.
template <typename Rule, typename Update>
FUSEDOPT_HD void count_block(const LaunchTable& table, std::uint32_t block,
                             const BlockTask<Update>& task, const Scalars& scalars) {
  if constexpr (kNumScalars<Rule> > 0) {
    if (!table.on_device) return;
    const std::uint32_t t = table.tensor_of(block);
    if (is_last_block(table, t) && !task.skip) {
      write_scalars<Rule>(scalars, table.pointers(t) + BlockTask<Update>::kSlots);
    }
  }
}

// Elements [first, first + kVector * num_vectors) of the block: this thread's share of them. All
// loads of a round are under way before the first is used.
template <typename T, int kUnroll, typename Slots, typename Update, std::size_t... S>
FUSEDOPT_HD void update_vectors(const BlockTask<Update>& task, const Slots& slots,
                                std::uint32_t first, std::uint32_t num_vectors,
                                std::uint32_t thread, std::uint32_t num_threads,
                                std::index_sequence<S...>) {
  constexpr int kSlots = BlockTask<Update>::kSlots, kVector = Slots::kVector;
  for (std::uint32_t begin = thread; begin < num_vectors; begin += num_threads * kUnroll) {
    typename Slots::Raw raw[kUnroll][kSlots];
    FUSEDOPT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t v = begin + u * num_threads;
      if (v >= num_vectors) continue;
      FUSEDOPT_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        raw[u][s] = slots.load(s, task.slots[s], first + v * kVector);
      }
    }
    FUSEDOPT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t v = begin + u * num_threads;
      if (v >= num_vectors) continue;
      T values[kSlots][kVector];
      FUSEDOPT_UNROLL
      for (int s = 0; s < kSlots; ++s) slots.unpack(s, raw[u][s], values[s]);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kVector; ++i) {
        task.update(values[0][i], values[1][i], values[2 + S][i]...);
      }
      FUSEDOPT_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        if (s == 1) continue;  // the gradient is only read
        slots.pack(s, values[s], &raw[u][s]);
        slots.store(s, task.slots[s], first + v * kVector, raw[u][s]);
      }
    }
  }
}

// The block with vectors, and the elements that are left over one by one.
template <typename T, int kUnroll, typename Vectors, typename Single, typename Update>
FUSEDOPT_HD void update_elements(const BlockTask<Update>& task, const Vectors& vectors,
                                 const Single& single, std::uint32_t thread,
                                 std::uint32_t num_threads) {
  constexpr std::make_index_sequence<Update::kNumStates> states;
  const std::uint32_t num_vectors = task.count / Vectors::kVector;
  const std::uint32_t done = num_vectors * Vectors::kVector;
  update_vectors<T, kUnroll>(task, vectors, 0, num_vectors, thread, num_threads, states);
  update_vectors<T, 1>(task, single, done, task.count - done, thread, num_threads, states);
}

// One thread's share of the block. Which branch is taken is the same for all of its threads. What is
// in flight at a time decides the registers of all of them: with twice as much of mixed dtypes and of
// single elements Adam has 72 for 63 (sm_90), and three blocks fit a multiprocessor, not four; RMSprop
// with all of its state 88 for 72, and two, not three. One vector of float32 in place of two saves none.
template <typename T, typename Update>
FUSEDOPT_HD void run_block(const BlockTask<Update>& task, std::uint32_t thread,
                           std::uint32_t num_threads) {
  if (task.skip) return;
  const bool vectors = task.info.access() == Access::kVectors;
  if constexpr (std::is_same_v<T, double>) {
    using Single = OneDtype<double, 1>;
    if (vectors) {
      update_elements<T, 2>(task, OneDtype<double, 2>(), Single(), thread, num_threads);
    } else {
      update_elements<T, 4>(task, Single(), Single(), thread, num_threads);
    }
  } else if (vectors) {
    switch (task.info.dtype(0)) {
      case Dtype::kBFloat16:
        return update_elements<T, 1>(task, OneDtype<BFloat16, 8>(), OneDtype<BFloat16, 1>(), thread,
                                     num_threads);
      case Dtype::kFloat16:
        return update_elements<T, 1>(task, OneDtype<Float16, 8>(), OneDtype<Float16, 1>(), thread,
                                     num_threads);
      default:
        return update_elements<T, 2>(task, OneDtype<float, 4>(), OneDtype<float, 1>(), thread,
                                     num_threads);
    }
  } else {
    const AnyDtype<1> single{task.info};
    if (task.info.access() == Access::kMixed) {
      update_elements<T, 1>(task, AnyDtype<4>{task.info}, single, thread, num_threads);
    } else {
      update_elements<T, 4>(task, single, single, thread, num_threads);
    }
  }
}

}  // namespace fusedopt
