#pragma once

// The block of the device for values that are not stored as they are (SlotDtypes::is_plain). A lane
// has eight neighbouring elements, eight lanes a scale. As in apply_kernel.h, ordinary functions.

#include "../storage/blockwise8.h"
#include "../storage/philox.h"
#include "../storage/split_master.h"
#include "../storage/stochastic.h"
#include "apply_kernel.h"
#include "slot_dtypes.h"

namespace fusedopt {

constexpr int kLaneElements = 8;
constexpr int kScaleLanes = kScaleElements / kLaneElements;

template <typename Update>
struct StoredTask {
  static constexpr int kSlots = 2 + Update::kNumStates;
  void* pointers[kMaxPointers];  // at the first element of the block
  std::int64_t begin;            // of the block in the tensor
  std::uint32_t count;
  bool skip;
  bool aligned;  // all that a lane moves, to its size
  std::uint64_t step;
  std::uint64_t rounding[2];
  float ema_weight;
  Update update;

  // What NVRTC compiles is for one way of storing values, which its program names, and has nothing in
  // it for others.
#if defined(FUSEDOPT_STORED)
  FUSEDOPT_HD void keep(const SlotDtypes&) {}
  FUSEDOPT_HD SlotDtypes dtypes() const { return SlotDtypes FUSEDOPT_STORED; }
#else
  SlotDtypes kept;
  FUSEDOPT_HD void keep(const SlotDtypes& dtypes) { kept = dtypes; }
  FUSEDOPT_HD SlotDtypes dtypes() const { return kept; }
#endif
  FUSEDOPT_HD Dtype dtype(int pointer) const {
    return pointer < kSlots ? dtypes().slots[pointer] : dtypes().extra(pointer);
  }
};

template <typename Rule>
FUSEDOPT_HD bool counts_on_device(const LaunchTable& table) {
  return kNumScalars<Rule> != 0 && table.on_device;
}

template <typename T, typename Rule, typename Update>
FUSEDOPT_HD Scalars begin_block(const LaunchTable& table, std::uint32_t block,
                                StoredTask<Update>* task) {
  const std::uint32_t t = table.tensor_of(block);
  const std::uint32_t chunk = block - table.first_chunk(t);
  task->begin = static_cast<std::int64_t>(chunk) * kBlockElements;
  const std::int64_t left = table.numel(t) - task->begin;
  task->count = static_cast<std::uint32_t>(left < kBlockElements ? left : kBlockElements);
  const TensorInfo info{table.info(t)};
  task->skip = table.scaling.skip();
  task->aligned = info.access() == Access::kVectors;
  void* const* const pointers = table.pointers(t);

  const void* const what = table.update(info.update());
  const StoredAs& as = table.on_device ? static_cast<const Stored<Rule>*>(what)->as
                                       : static_cast<const Stored<Update>*>(what)->as;
  task->keep(as.dtypes);
  task->ema_weight = as.ema_weight;
  Scalars scalars = info.first_step() ? 1 : 2;
  if (!table.on_device) scalars = as.step;
  if constexpr (kNumScalars<Rule> != 0) {
    if (counts_on_device<Rule>(table)) {
      const Rule& rule = static_cast<const Stored<Rule>*>(what)->what;
      scalars = read_scalars(rule, pointers + kMaxPointers);
    }
  }
  task->step = static_cast<std::uint64_t>(scalars.step);
  if (task->dtypes().stochastic) {
    const auto* const rounding = static_cast<const std::uint64_t*>(pointers[kRounding]);
    task->rounding[0] = rounding[0];
    task->rounding[1] = *static_cast<const volatile std::uint64_t*>(rounding + 1);
  }
  if (table.on_device) {
    static_cast<const Stored<Rule>*>(what)->what.template prepare<T>(
        scalars, [&](const auto& update) {
          if constexpr (std::is_same_v<std::decay_t<decltype(update)>, Update>) {
            task->update = update;
          }
        });
  } else {
    task->update = static_cast<const Stored<Update>*>(what)->what;
  }
  task->update.penalized_grad.grad_factor *= static_cast<T>(table.scaling.grad_factor());
  FUSEDOPT_UNROLL
  for (int p = 0; p < kMaxPointers; ++p) {
    const std::int64_t at = p >= kScales ? task->begin / kScaleElements : task->begin;
    const bool has_elements = pointers[p] != nullptr && p != kRounding;
    const std::int64_t bytes = has_elements ? at * itemsize(task->dtype(p)) : 0;
    task->pointers[p] = static_cast<char*>(pointers[p]) + bytes;
  }
  return scalars;
}

// The block of the tensor that is the last to have read the counts moves them on.
template <typename Rule, typename Update>
FUSEDOPT_HD void count_block(const LaunchTable& table, std::uint32_t block,
                             const StoredTask<Update>& task, const Scalars& scalars) {
  const bool is_rounding = task.dtypes().stochastic;
  if (!counts_on_device<Rule>(table) && !is_rounding) return;
  const std::uint32_t t = table.tensor_of(block);
  if (!is_last_block(table, t) || task.skip) return;
  void* const* const pointers = table.pointers(t);
  if constexpr (kNumScalars<Rule> != 0) {
    if (table.on_device) write_scalars<Rule>(scalars, pointers + kMaxPointers);
  }
  if (is_rounding) static_cast<std::uint64_t*>(pointers[kRounding])[1] = task.rounding[1] + 1;
}

// Up to eight neighbouring elements of type Element, from the first element of the block on.
template <typename Element>
FUSEDOPT_HD void load_lane(const void* from, std::uint32_t first, int n, bool vector,
                           Element (&to)[kLaneElements]) {
  const auto* const elements = static_cast<const Element*>(from) + first;
  if (vector) {
    constexpr int kBytes = sizeof(to) < 16 ? sizeof(to) : 16;
    FUSEDOPT_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(to)) / kBytes; ++i) {
      const auto bytes = load_bytes<kBytes>(reinterpret_cast<const char*>(elements) + i * kBytes);
      std::memcpy(reinterpret_cast<char*>(to) + i * kBytes, &bytes, kBytes);
    }
    return;
  }
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) to[i] = i < n ? elements[i] : Element();
}

template <typename Element>
FUSEDOPT_HD void store_lane(void* to, std::uint32_t first, int n, bool vector,
                            const Element (&from)[kLaneElements]) {
  auto* const elements = static_cast<Element*>(to) + first;
  if (vector) {
    constexpr int kBytes = sizeof(from) < 16 ? sizeof(from) : 16;
    FUSEDOPT_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(from)) / kBytes; ++i) {
      Bytes<kBytes> bytes;
      std::memcpy(&bytes, reinterpret_cast<const char*>(from) + i * kBytes, kBytes);
      store_bytes(reinterpret_cast<char*>(elements) + i * kBytes, bytes);
    }
    return;
  }
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    if (i < n) elements[i] = from[i];
  }
}

FUSEDOPT_HD void load_floats(Dtype dtype, const void* from, std::uint32_t first, int n, bool vector,
                             float (&to)[kLaneElements]) {
  if (dtype == Dtype::kFloat32) return load_lane(from, first, n, vector, to);
  std::uint16_t bits[kLaneElements];
  load_lane(from, first, n, vector, bits);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    to[i] = dtype == Dtype::kBFloat16 ? half_to_float(bits[i], BFloat16())
                                      : half_to_float(bits[i], Float16());
  }
}

FUSEDOPT_HD std::uint16_t half_of(Dtype dtype, float value) {
  const std::uint32_t bits = dtype == Dtype::kBFloat16 ? pack_halves(value, value, BFloat16())
                                                       : pack_halves(value, value, Float16());
  return static_cast<std::uint16_t>(bits);
}

FUSEDOPT_HD void store_floats(Dtype dtype, void* to, std::uint32_t first, int n, bool vector,
                              const float (&from)[kLaneElements]) {
  if (dtype == Dtype::kFloat32) return store_lane(to, first, n, vector, from);
  std::uint16_t bits[kLaneElements];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) bits[i] = half_of(dtype, from[i]);
  store_lane(to, first, n, vector, bits);
}

// One lane's elements on their way through the update.
template <typename Update>
struct Lane {
  std::uint32_t first;
  int n;  // 0 beyond the end
  bool vector;
  float values[StoredTask<Update>::kSlots][kLaneElements];
  std::uint32_t largest[kMaxStates];  // magnitude of each state
};

template <typename Update>
FUSEDOPT_HD void load_param(const StoredTask<Update>& task, Lane<Update>* lane) {
  float (&param)[kLaneElements] = lane->values[0];
  if (task.dtypes().master == Dtype::kInt16) {
    std::uint16_t high[kLaneElements], low[kLaneElements];
    load_lane(task.pointers[0], lane->first, lane->n, lane->vector, high);
    load_lane(task.pointers[kMaster], lane->first, lane->n, lane->vector, low);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) param[i] = join_master(high[i], low[i]);
    return;
  }
  load_floats(task.dtype(0), task.pointers[0], lane->first, lane->n, lane->vector, param);
  if (task.dtypes().master == kNone) return;
  float master[kLaneElements];
  load_lane(task.pointers[kMaster], lane->first, lane->n, lane->vector, master);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    const std::uint16_t rounded = half_of(task.dtype(0), master[i]);
    const float seen = task.dtype(0) == Dtype::kBFloat16 ? half_to_float(rounded, BFloat16())
                                                         : half_to_float(rounded, Float16());
    param[i] = bits_from_float(seen) == bits_from_float(param[i]) ? master[i] : param[i];
  }
}

template <typename Update>
FUSEDOPT_HD Random8 random_of(const StoredTask<Update>& task, const Lane<Update>& lane,
                              std::uint64_t key, std::uint64_t step) {
  return philox(key, step, static_cast<std::uint64_t>(task.begin + lane.first) / kLaneElements);
}

template <typename Update>
FUSEDOPT_HD void store_param(const StoredTask<Update>& task, const Lane<Update>& lane) {
  const float (&param)[kLaneElements] = lane.values[0];
  const SlotDtypes dtypes = task.dtypes();
  if (dtypes.master == Dtype::kInt16) {
    std::uint16_t high[kLaneElements], low[kLaneElements];
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) split_master(param[i], &high[i], &low[i]);
    store_lane(task.pointers[0], lane.first, lane.n, lane.vector, high);
    store_lane(task.pointers[kMaster], lane.first, lane.n, lane.vector, low);
    return;
  }
  if (dtypes.master != kNone) {
    store_lane(task.pointers[kMaster], lane.first, lane.n, lane.vector, param);
  }
  if (dtypes.stochastic) {
    const Random8 random = random_of(task, lane, task.rounding[0], task.rounding[1]);
    std::uint16_t bits[kLaneElements];
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      bits[i] = round_stochastically(param[i], random[i]).bits;
    }
    store_lane(task.pointers[0], lane.first, lane.n, lane.vector, bits);
    return;
  }
  store_floats(task.dtype(0), task.pointers[0], lane.first, lane.n, lane.vector, param);
}

template <typename Update>
FUSEDOPT_HD float* scale_of(const StoredTask<Update>& task, const Lane<Update>& lane, int state) {
  return static_cast<float*>(task.pointers[kScales + state]) + lane.first / kScaleElements;
}

template <typename Update>
FUSEDOPT_HD void load_state(const StoredTask<Update>& task, int state, Lane<Update>* lane) {
  const Dtype dtype = task.dtype(2 + state);
  const void* const from = task.pointers[2 + state];
  float (&to)[kLaneElements] = lane->values[2 + state];
  if (is_float(dtype)) return load_floats(dtype, from, lane->first, lane->n, lane->vector, to);
  const float scale = lane->n > 0 ? *scale_of(task, *lane, state) : 0.0f;
  std::uint8_t codes[kLaneElements];
  load_lane(from, lane->first, lane->n, lane->vector, codes);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    to[i] = dtype == Dtype::kInt8 ? decode_signed(static_cast<std::int8_t>(codes[i]), scale)
                                  : decode_unsigned(codes[i], scale);
  }
}

template <typename Update>
FUSEDOPT_HD void store_state(const StoredTask<Update>& task, int state, const Lane<Update>& lane) {
  const Dtype dtype = task.dtype(2 + state);
  void* const to = task.pointers[2 + state];
  const float (&from)[kLaneElements] = lane.values[2 + state];
  if (is_float(dtype)) return store_floats(dtype, to, lane.first, lane.n, lane.vector, from);
  const float largest = float_from_bits(lane.largest[state]);
  if (lane.n > 0 && lane.first % kScaleElements == 0) *scale_of(task, lane, state) = largest;
  const Scale scale(largest);
  std::uint8_t codes[kLaneElements];
  if (dtype == Dtype::kInt8) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      codes[i] = static_cast<std::uint8_t>(encode_signed(from[i], scale));
    }
  } else {
    const Random8 random = random_of(task, lane, kCodeKey + state, task.step);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) codes[i] = encode_unsigned(from[i], scale, random[i]);
  }
  store_lane(to, lane.first, lane.n, lane.vector, codes);
}

// Up to where a lane can go by itself: the update, and the largest magnitudes among its elements.
// `kWhole`: the lanes of all threads are vectors.
template <bool kWhole, typename Update, std::size_t... S>
FUSEDOPT_HD void load_and_update(const StoredTask<Update>& task, std::uint32_t first,
                                 Lane<Update>* lane, std::index_sequence<S...>) {
  lane->first = first;
  const std::uint32_t left = first < task.count ? task.count - first : 0;
  lane->n = static_cast<int>(kWhole || left >= kLaneElements ? kLaneElements : left);
  lane->vector = kWhole || (task.aligned && lane->n == kLaneElements);
  load_param(task, lane);
  load_floats(task.dtype(1), task.pointers[1], first, lane->n, lane->vector, lane->values[1]);
  (load_state(task, S, lane), ...);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    task.update(lane->values[0][i], lane->values[1][i], lane->values[2 + S][i]...);
  }
  FUSEDOPT_UNROLL
  for (int s = 0; s < Update::kNumStates; ++s) {
    lane->largest[s] = 0;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const std::uint32_t bits = i < lane->n ? magnitude_bits(lane->values[2 + s][i]) : 0u;
      lane->largest[s] = bits > lane->largest[s] ? bits : lane->largest[s];
    }
  }
}

// The rest, once the lanes of a scale know the largest magnitudes among all of them.
template <typename Update>
FUSEDOPT_HD void store(const StoredTask<Update>& task, const Lane<Update>& lane) {
  store_param(task, lane);
  FUSEDOPT_UNROLL
  for (int s = 0; s < Update::kNumStates; ++s) store_state(task, s, lane);
  if (task.dtypes().ema == kNone) return;
  float ema[kLaneElements];
  const Dtype dtype = task.dtypes().ema;
  load_floats(dtype, task.pointers[kEma], lane.first, lane.n, lane.vector, ema);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    ema[i] = ema[i] + task.ema_weight * (lane.values[0][i] - ema[i]);
  }
  store_floats(dtype, task.pointers[kEma], lane.first, lane.n, lane.vector, ema);
}

#if defined(__CUDACC__)

// One lane of each thread of a block, which exchange values.
template <bool kWhole, typename Update>
__device__ void run_lane(const StoredTask<Update>& task, std::uint32_t first) {
  Lane<Update> lane;
  load_and_update<kWhole>(task, first, &lane, std::make_index_sequence<Update::kNumStates>());
  FUSEDOPT_UNROLL
  for (int s = 0; s < Update::kNumStates; ++s) {
    FUSEDOPT_UNROLL
    for (int distance = 1; distance < kScaleLanes; distance *= 2) {
      const std::uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, lane.largest[s], distance);
      lane.largest[s] = other > lane.largest[s] ? other : lane.largest[s];
    }
  }
  store(task, lane);
}

// One thread's share of the block.
template <typename Update>
__device__ void run_stored_block(const StoredTask<Update>& task) {
  if (task.skip) return;
  const std::uint32_t round = blockDim.x * kLaneElements;
  const std::uint32_t first = threadIdx.x * kLaneElements;
  std::uint32_t done = 0;
  if (task.aligned) {
    for (; done + round <= task.count; done += round) run_lane<true>(task, done + first);
  }
  for (; done < task.count; done += round) run_lane<false>(task, done + first);
}

#else  // FUSEDOPT_KERNELS_ON_HOST

// All of the block, one scale after the other.
template <typename Update>
void run_stored_block(const StoredTask<Update>& task) {
  if (task.skip) return;
  for (std::uint32_t first = 0; first < task.count; first += kScaleElements) {
    Lane<Update> lanes[kScaleLanes];
    std::uint32_t largest[kMaxStates] = {};
    for (int l = 0; l < kScaleLanes; ++l) {
      load_and_update<false>(task, first + l * kLaneElements, &lanes[l],
                             std::make_index_sequence<Update::kNumStates>());
      for (int s = 0; s < Update::kNumStates; ++s) {
        if (lanes[l].largest[s] > largest[s]) largest[s] = lanes[l].largest[s];
      }
    }
    for (Lane<Update>& lane : lanes) {
      std::memcpy(lane.largest, largest, sizeof(largest));
      store(task, lane);
    }
  }
}

#endif

}  // namespace fusedopt
