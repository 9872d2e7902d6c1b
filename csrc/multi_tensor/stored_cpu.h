#pragma once

// The loop for values that are not stored as they are (SlotDtypes::is_plain): loads a block as
// float, updates it, and stores it. How a value is stored is in storage/. What does not depend on the
// update is compiled once for each instruction set.

#include <algorithm>
#include <cstdint>

#include "../storage/blockwise8.h"
#include "../storage/blockwise8_lanes.h"
#include "../storage/half.h"
#include "../storage/philox_lanes.h"
#include "../storage/split_master.h"
#include "../storage/stochastic.h"
#include "apply.h"
#include "tuning.h"

namespace fusedopt {

// Some elements of one tensor.
struct Span {
  void* const* pointers;
  std::int64_t at;  // a multiple of kScaleElements
  int n;

  template <typename T>
  FUSEDOPT_HD T* of(int slot) const {
    return static_cast<T*>(pointers[slot]) + at;
  }
  FUSEDOPT_HD float* scales(int state) const {
    return static_cast<float*>(pointers[kScales + state]) + at / kScaleElements;
  }
  // The elements of one scale.
  FUSEDOPT_HD Span block(int begin) const {
    return {pointers, at + begin, std::min(n - begin, kScaleElements)};
  }
};

// As load_as_float in half.h: where the floats are, and they are updated there.
template <Isa isa>
__attribute__((noinline)) float* load_param(const SlotDtypes& dtypes, const Span& span,
                                            float* buffer) {
  if (dtypes.master == Dtype::kInt16) {
    load_masters(span.of<std::uint16_t>(0), span.of<std::uint16_t>(kMaster), span.n, buffer);
    return buffer;
  }
  const float* param =
      load_as_float<isa>(dtypes.slots[0], span.pointers[0], span.at, span.n, buffer);
  if (dtypes.master == kNone) return const_cast<float*>(param);
  // A parameter that is not its master rounded was written by somebody else: it counts.
  auto* master = span.of<float>(kMaster);
  float rounded[kStoredElements];
  std::uint16_t halves[kStoredElements];
  store_from_float<isa>(dtypes.slots[0], halves, 0, span.n, master);
  load_as_float<isa>(dtypes.slots[0], halves, 0, span.n, rounded);
#pragma omp simd
  for (int i = 0; i < span.n; ++i) {
    const bool same = bits_from_float(rounded[i]) == bits_from_float(param[i]);
    master[i] = same ? master[i] : param[i];
  }
  return master;
}

template <Isa isa>
__attribute__((noinline)) void store_param(const SlotDtypes& dtypes, const Span& span,
                                           const float* from) {
  if (dtypes.master == Dtype::kInt16) {
    return store_masters(from, span.n, span.of<std::uint16_t>(0), span.of<std::uint16_t>(kMaster));
  }
  if (dtypes.stochastic) {
    const auto* rounding = static_cast<const std::uint64_t*>(span.pointers[kRounding]);
    std::uint16_t bits[kStoredElements];
    const PhiloxKeys keys = philox_keys<isa>(rounding[0]);
    for (int begin = 0; begin < span.n; begin += kRandomElements) {
      random_bits<isa>(keys, rounding[1], span.at + begin, bits + begin);
    }
    auto* to = span.of<BFloat16>(0);
#pragma omp simd
    for (int i = 0; i < span.n; ++i) to[i] = round_stochastically(from[i], bits[i]);
    return;
  }
  store_from_float<isa>(dtypes.slots[0], span.pointers[0], span.at, span.n, from);
}

// The elements of one scale, or those of them that there are.
template <Isa isa, typename Code>
FUSEDOPT_HD void decode_block(const Code* from, int n, float scale, float* to) {
#if defined(FUSEDOPT_HAS_LANES)
  if (n == kScaleElements) return decode_lanes(from, scale, to);
#endif
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = decode(from[i], scale);
}

template <Isa isa>
FUSEDOPT_HD void decode_block(const SlotDtypes& dtypes, const Span& block, int state, float* to) {
  const float scale = *block.scales(state);
  if (dtypes.slots[2 + state] == Dtype::kInt8) {
    decode_block<isa>(block.of<std::int8_t>(2 + state), block.n, scale, to);
  } else {
    decode_block<isa>(block.of<std::uint8_t>(2 + state), block.n, scale, to);
  }
}

template <Isa isa>
__attribute__((noinline)) float* load_state(const SlotDtypes& dtypes, const Span& span, int state,
                                            float* to) {
  const Dtype dtype = dtypes.slots[2 + state];
  if (is_float(dtype)) {
    return load_as_float<isa>(dtype, span.pointers[2 + state], span.at, span.n, to);
  }
  for (int begin = 0; begin < span.n; begin += kScaleElements) {
    decode_block<isa>(dtypes, span.block(begin), state, to + begin);
  }
  return to;
}

template <Isa isa>
FUSEDOPT_HD void encode_block(const SlotDtypes& dtypes, const Span& block, int state,
                              const Scale& scale, const PhiloxKeys& keys, std::uint64_t step,
                              const float* from) {
  [[maybe_unused]] const bool in_lanes = block.n == kScaleElements && scale.raise == 1.0f;
  if (dtypes.slots[2 + state] == Dtype::kInt8) {
    auto* codes = block.of<std::int8_t>(2 + state);
#if defined(FUSEDOPT_HAS_LANES)
    if (in_lanes) return encode_lanes_signed(from, scale, codes);
#endif
#pragma omp simd
    for (int i = 0; i < block.n; ++i) codes[i] = encode_signed(from[i], scale);
    return;
  }
  auto* codes = block.of<std::uint8_t>(2 + state);
#if defined(FUSEDOPT_HAS_LANES)
  if (in_lanes) return encode_lanes_unsigned<isa>(from, scale, keys, step, block.at, codes);
#endif
  std::uint16_t bits[kRandomElements];
  float exact[kScaleElements];
#pragma omp simd
  for (int i = 0; i < block.n; ++i) exact[i] = exact_unsigned(from[i], scale);
  random_bits<isa>(keys, step, block.at, bits);
#pragma omp simd
  for (int i = 0; i < block.n; ++i) codes[i] = round_unsigned(exact[i], from[i], bits[i]);
}

// The largest magnitude of a block, which is its scale.
FUSEDOPT_HD void store_scale(const Span& block, int state, const float* from) {
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < block.n; ++i) largest = std::max(largest, magnitude_bits(from[i]));
  *block.scales(state) = float_from_bits(largest);
}

// Once their scales are stored: all of them first, each of which waits for its 64 elements, then all
// codes, which wait for nothing.
template <Isa isa>
__attribute__((noinline)) void store_states(const SlotDtypes& dtypes, double step, const Span& span,
                                            float* const* states) {
  Scale scale_of[kMaxStates][kStoredElements / kScaleElements];
  PhiloxKeys keys[kMaxStates];
  const int num_states = dtypes.num_slots - 2;
  for (int state = 0; state < num_states; ++state) {
    const Dtype dtype = dtypes.slots[2 + state];
    if (is_float(dtype)) {
      store_from_float<isa>(dtype, span.pointers[2 + state], span.at, span.n, states[state]);
      continue;
    }
    if (dtype == Dtype::kUInt8) keys[state] = philox_keys<isa>(kCodeKey + state);
    const float* scales = span.scales(state);
    for (int block = 0; block * kScaleElements < span.n; ++block) {
      scale_of[state][block] = Scale(scales[block]);
    }
  }
  for (int begin = 0; begin < span.n; begin += kScaleElements) {
    for (int state = 0; state < num_states; ++state) {
      if (is_float(dtypes.slots[2 + state])) continue;
      encode_block<isa>(dtypes, span.block(begin), state, scale_of[state][begin / kScaleElements],
                        keys[state], static_cast<std::uint64_t>(step), states[state] + begin);
    }
  }
}

template <Isa isa>
__attribute__((noinline)) void update_ema(const SlotDtypes& dtypes, float weight, const Span& span,
                                          const float* param) {
  float buffer[kStoredElements];
  float* ema = load_as_float<isa>(dtypes.ema, span.pointers[kEma], span.at, span.n, buffer);
#pragma omp simd
  for (int i = 0; i < span.n; ++i) ema[i] = ema[i] + weight * (param[i] - ema[i]);
  store_from_float<isa>(dtypes.ema, span.pointers[kEma], span.at, span.n, ema);
}

// Asks for the next elements while these are computed, which are too many for the processor to do by
// itself: 92% of the memory floor instead of 80% (AdamW, exact masters in two bytes, float32 state,
// 124 M parameters, two threads of an EPYC 9005, 2026-11).
template <Isa isa>
__attribute__((noinline)) void prefetch_next(const SlotDtypes& dtypes, const Span& span,
                                             int num_slots) {
  const auto prefetch = [&](int pointer, Dtype dtype) {
    const auto begin = static_cast<std::size_t>(span.at + span.n) * itemsize(dtype);
    const auto* data = static_cast<const char*>(span.pointers[pointer]) + begin;
    for (std::size_t at = 0; at < span.n * itemsize(dtype); at += 64) __builtin_prefetch(data + at);
  };
  for (int slot = 0; slot < num_slots; ++slot) prefetch(slot, dtypes.slots[slot]);
  if (dtypes.master != kNone) prefetch(kMaster, dtypes.master);
  if (dtypes.ema != kNone) prefetch(kEma, dtypes.ema);
}

// Loads the states of a span, updates it, and stores the scales of states that have one.
template <Isa isa>
FUSEDOPT_HD void update_span(const PreparedUpdate& prepared, const Span& span, float** arrays,
                             float (*buffers)[kStoredElements]) {
  const SlotDtypes& dtypes = prepared.stored.dtypes;
  void* arguments[kMaxSlots];
  for (int slot = 0; slot < dtypes.num_slots; ++slot) {
    if (slot >= 2) arrays[slot] = load_state<isa>(dtypes, span, slot - 2, buffers[slot]);
    arguments[slot] = arrays[slot];
  }
  prepared.update_arrays(prepared, arguments, span.n);
  for (int slot = 2; slot < dtypes.num_slots; ++slot) {
    if (is_float(dtypes.slots[slot])) continue;
    for (int begin = 0; begin < span.n; begin += kScaleElements) {
      store_scale(span.block(begin), slot - 2, arrays[slot] + begin);
    }
  }
}

// update(span, arrays, buffers) does as update_span.
template <Isa isa, typename UpdateSpan>
FUSEDOPT_HD void stored_loop(const PreparedUpdate& prepared, void* const* pointers,
                             std::int64_t begin, std::int64_t count, const UpdateSpan& update) {
  const StoredAs& stored = prepared.stored;
  const SlotDtypes& dtypes = stored.dtypes;
  alignas(64) float buffers[kMaxSlots][kStoredElements];
  float* arrays[kMaxSlots];
  for (std::int64_t done = 0; done < count; done += kStoredElements) {
    const std::int64_t left = count - done;
    const Span span{pointers, begin + done,
                    left < kStoredElements ? static_cast<int>(left) : kStoredElements};
    if (left >= 2 * kStoredElements) prefetch_next<isa>(dtypes, span, dtypes.num_slots);
    arrays[0] = load_param<isa>(dtypes, span, buffers[0]);
    arrays[1] = load_as_float<isa>(dtypes.slots[1], pointers[1], span.at, span.n, buffers[1]);
    update(span, arrays, buffers);
    store_param<isa>(dtypes, span, arrays[0]);
    store_states<isa>(dtypes, stored.step, span, arrays + 2);
    if (dtypes.ema != kNone) update_ema<isa>(dtypes, stored.ema_weight, span, arrays[0]);
  }
}

template <Isa isa>
void stored_kernel(const PreparedUpdate& prepared, void* const* pointers, std::int64_t begin,
                   std::int64_t count) {
  stored_loop<isa>(
      prepared, pointers, begin, count,
      [&](const Span& span, float** arrays, auto* buffers)
          __attribute__((always_inline)) { update_span<isa>(prepared, span, arrays, buffers); });
}

}  // namespace fusedopt
