#pragma once

// The loops. This header is compiled once per instruction-set level; whatever it defines is either
// always inlined or a template over the level, so that the linker cannot mix the levels up.

#include <cstring>
#include <utility>

#include "../storage/half.h"
#include "../update_rules/host_device.h"
#include "apply.h"
#include "stored_cpu.h"
#include "tuning.h"

namespace fusedopt {

// The loop of every rule. Element i of each array depends on element i of the others only, also
// where grad is param, so iterations may run in any order.
template <Isa isa, typename T, typename Update, std::size_t... S>
FUSEDOPT_HD void update_elements(const Update& update, std::int64_t count, T* param, const T* grad,
                                 T* const* state, std::index_sequence<S...>) {
  T* const arrays[kMaxStates] = {state[S]...};
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    const auto element = [&](T p, T g, auto... s) __attribute__((always_inline)) {
      update(p, g, s...);
      param[i] = p;
      ((arrays[S][i] = s), ...);
    };
    element(param[i], grad[i], arrays[S][i]...);
  }
}

template <typename Update>
FUSEDOPT_HD Update coefficients(const PreparedUpdate& prepared) {
  Update update;
  std::memcpy(&update, prepared.coefficients, sizeof(Update));
  return update;
}

// Calls use(update), which the compiler sees once with penalties and once without: what is tested for
// every element otherwise took Adam a third of its time (100 x 10,000 in the cache, two threads of an
// EPYC 9005, 2026-11: 0.25 to 0.15 ms, bfloat16 0.32 to 0.20; RMSprop and SGD within 10%).
template <typename Update, typename Use>
FUSEDOPT_HD void with_coefficients(const PreparedUpdate& prepared, Use&& use) {
  Update update = coefficients<Update>(prepared);
  if (update.has_penalty()) return use(update);
  update.drop_penalty();
  use(update);
}

// Apart from how the arrays come about: each update is compiled once in float and once in double, not
// once for every way in which values are stored: with nine rules 1.6 MB of module instead of 4.2, at the
// cost of 2 to 5% in the cache where values are converted or not stored as they are, and of nothing
// elsewhere (Adam, one thread of an EPYC, 2026-11).
template <Isa isa, typename T, typename Update>
__attribute__((noinline)) void update_arrays(const PreparedUpdate& prepared, void* const* slots,
                                             std::int64_t count) {
  T* arrays[kMaxSlots];
  for (int slot = 0; slot < 2 + Update::kNumStates; ++slot) {
    arrays[slot] = static_cast<T*>(slots[slot]);
  }
  with_coefficients<Update>(prepared, [&](const Update& update) __attribute__((always_inline)) {
    update_elements<isa>(update, count, arrays[0], arrays[1], arrays + 2,
                         std::make_index_sequence<Update::kNumStates>());
  });
}

// One dtype everywhere that needs no conversion: straight over the arrays.
template <Isa isa, typename T>
void plain_kernel(const PreparedUpdate& prepared, void* const* slots, std::int64_t begin,
                  std::int64_t count) {
  void* arrays[kMaxSlots];
  for (int slot = 0; slot < prepared.stored.dtypes.num_slots; ++slot) {
    arrays[slot] = static_cast<T*>(slots[slot]) + begin;
  }
  prepared.update_arrays(prepared, arrays, count);
}

// Any mix of float32, bfloat16 and float16: halves block by block through float buffers, float32
// where it is.
template <Isa isa>
void converting_kernel(const PreparedUpdate& prepared, void* const* slots, std::int64_t begin,
                       std::int64_t count) {
  const int num_slots = prepared.stored.dtypes.num_slots;
  const Dtype* const dtypes = prepared.stored.dtypes.slots;
  alignas(64) float buffers[kMaxSlots][kConvertElements];
  float* arrays[kMaxSlots];
  void* arguments[kMaxSlots];
  for (std::int64_t done = 0; done < count; done += kConvertElements) {
    const std::int64_t left = count - done, at = begin + done;
    const int n = left < kConvertElements ? static_cast<int>(left) : kConvertElements;
    for (int slot = 0; slot < num_slots; ++slot) {
      arrays[slot] = load_as_float<isa>(dtypes[slot], slots[slot], at, n, buffers[slot]);
      arguments[slot] = arrays[slot];
    }
    prepared.update_arrays(prepared, arguments, n);
    for (int slot = 0; slot < num_slots; ++slot) {
      if (slot == 1) continue;  // the gradient is only read
      store_from_float<isa>(dtypes[slot], slots[slot], at, n, arrays[slot]);
    }
  }
}

// One half dtype everywhere, bfloat16 also with exact masters in two parts: a few vectors at a time,
// which the compiler unrolls, so that conversions and arithmetic overlap. What is left over goes the
// way of a mix.
template <Isa isa, typename Half, bool kSplit, typename Update, std::size_t... S>
FUSEDOPT_HD void update_halves(const Update& update, void* const* slots, std::int64_t at,
                               std::index_sequence<S...> states) {
  constexpr int n = kHalfElements<isa>;
  alignas(64) float param[n], grad[n], state[kMaxStates][n];
  float* const arrays[kMaxStates] = {state[S]...};
  const auto bits = [&](int slot) __attribute__((always_inline)) {
    return static_cast<std::uint16_t*>(slots[slot]) + at;
  };
  if constexpr (kSplit) {
    load_masters(bits(0), bits(kMaster), n, param);
  } else {
    load_half(static_cast<const Half*>(slots[0]) + at, n, param);
  }
  load_half(static_cast<const Half*>(slots[1]) + at, n, grad);
  (load_half(static_cast<const Half*>(slots[2 + S]) + at, n, state[S]), ...);
  update_elements<isa>(update, n, param, grad, arrays, states);
  if constexpr (kSplit) {
    store_masters(param, n, bits(0), bits(kMaster));
  } else {
    store_half(param, n, static_cast<Half*>(slots[0]) + at);
  }
  (store_half(state[S], n, static_cast<Half*>(slots[2 + S]) + at), ...);
}

template <Isa isa, typename Half, bool kSplit, typename Update>
void half_kernel(const PreparedUpdate& prepared, void* const* slots, std::int64_t begin,
                 std::int64_t count) {
  constexpr int n = kHalfElements<isa>;
  constexpr std::make_index_sequence<Update::kNumStates> states;
  with_coefficients<Update>(prepared, [&](const Update& update) __attribute__((always_inline)) {
    for (std::int64_t done = 0; done + n <= count; done += n) {
      update_halves<isa, Half, kSplit>(update, slots, begin + done, states);
    }
  });
  const std::int64_t done = count / n * n;
  constexpr ChunkKernel rest = kSplit ? stored_kernel<isa> : converting_kernel<isa>;
  rest(prepared, slots, begin + done, count - done);
}

// The loop for exact masters in two parts. On the baseline one of its own gains 2%, which is not worth
// 0.2 MB of module.
template <Isa isa, typename Update>
ChunkKernel split_kernel() {
  if constexpr (isa == Isa::baseline) {
    return stored_kernel<isa>;
  } else {
    return half_kernel<isa, BFloat16, true, Update>;
  }
}

// State in 8 bits: codes are multiplied out, and scales found, while the roots and quotients of the
// elements before them are being drawn. By itself, for one thread of an EPYC 9004, in cache, ns per
// element (AdamW, bfloat16 parameters, 2026-11): AVX-512 1.55 to 1.35, AVX2 1.75 to 1.58. With the codes
// in vectors (storage/blockwise8_lanes.h) it takes 0.34 MB of module.
template <Isa isa, typename Update, std::size_t... S>
FUSEDOPT_HD void update_codes(const PreparedUpdate& prepared, const Update& update,
                              const Span& span, float** arrays, float (*buffers)[kStoredElements],
                              std::index_sequence<S...> states) {
  const SlotDtypes& dtypes = prepared.stored.dtypes;
  const bool has_codes[] = {!is_float(dtypes.slots[2 + S])...};
  ((arrays[2 + S] =
        has_codes[S] ? buffers[2 + S] : load_state<isa>(dtypes, span, S, buffers[2 + S])),
   ...);
  for (int begin = 0; begin < span.n; begin += kScaleElements) {
    const Span block{span.pointers, span.at + begin, kScaleElements};
    float* const state[kMaxStates] = {arrays[2 + S] + begin...};
    ((has_codes[S] ? decode_block<isa>(dtypes, block, S, state[S]) : void()), ...);
    update_elements<isa>(update, kScaleElements, arrays[0] + begin, arrays[1] + begin, state,
                         states);
    ((has_codes[S] ? store_scale(block, S, state[S]) : void()), ...);
  }
}

template <Isa isa, typename Update>
void coded_kernel(const PreparedUpdate& prepared, void* const* slots, std::int64_t begin,
                  std::int64_t count) {
  constexpr std::make_index_sequence<Update::kNumStates> states;
  with_coefficients<Update>(prepared, [&](const Update& update) __attribute__((always_inline)) {
    stored_loop<isa>(prepared, slots, begin, count,
                     [&](const Span& span, float** arrays, auto* buffers)
                         __attribute__((always_inline)) {
                           if (span.n % kScaleElements != 0) {
                             return update_span<isa>(prepared, span, arrays, buffers);
                           }
                           update_codes<isa>(prepared, update, span, arrays, buffers, states);
                         });
  });
}

// The loop for codes. The baseline spends its time in their roots: one of its own gains nothing there.
template <Isa isa, typename Update>
ChunkKernel codes_kernel() {
  if constexpr (isa == Isa::baseline || Update::kNumStates == 0) {
    return stored_kernel<isa>;
  } else {
    return coded_kernel<isa, Update>;
  }
}

template <Isa isa, typename Update>
void scale_grads(PreparedUpdate* prepared, double factor) {
  Update update = coefficients<Update>(*prepared);
  auto& grad_factor = update.penalized_grad.grad_factor;
  grad_factor *= static_cast<std::decay_t<decltype(grad_factor)>>(factor);
  std::memcpy(prepared->coefficients, &update, sizeof(update));
}

template <Isa isa, typename Rule>
PreparedUpdate prepare_cpu(const Rule& rule, const Scalars& scalars, const StoredAs& stored) {
  const SlotDtypes& dtypes = stored.dtypes;
  PreparedUpdate prepared;
  prepared.stored = stored;
  prepared.stored.step = scalars.step;
  const auto use = [&](ChunkKernel kernel, ArraysKernel arrays, const auto& update) {
    static_assert(sizeof(update) <= kMaxCoefficientBytes);
    using Update = std::decay_t<decltype(update)>;
    prepared.kernel = kernel;
    prepared.update_arrays = arrays;
    prepared.scale_grads = scale_grads<isa, Update>;
    std::memcpy(prepared.coefficients, &update, sizeof(update));
  };
  if (dtypes.all(Dtype::kFloat64)) {
    rule.template prepare<double>(scalars, [&](const auto& update) {
      using Update = std::decay_t<decltype(update)>;
      use(plain_kernel<isa, double>, update_arrays<isa, double, Update>, update);
    });
  } else {
    rule.template prepare<float>(scalars, [&](const auto& update) {
      using Update = std::decay_t<decltype(update)>;
      use(dtypes.is_split_bfloat16()     ? split_kernel<isa, Update>()
          : dtypes.has_codes()           ? codes_kernel<isa, Update>()
          : !dtypes.is_plain()           ? stored_kernel<isa>
          : dtypes.all(Dtype::kFloat32)  ? plain_kernel<isa, float>
          : dtypes.all(Dtype::kBFloat16) ? half_kernel<isa, BFloat16, false, Update>
          : dtypes.all(Dtype::kFloat16)  ? half_kernel<isa, Float16, false, Update>
                                         : converting_kernel<isa>,
          update_arrays<isa, float, Update>, update);
    });
  }
  return prepared;
}

}  // namespace fusedopt
