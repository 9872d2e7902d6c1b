#pragma once

// The block of the device for values that are not stored as they are (SlotDtypes::is_plain). A lane
// has eight neighbouring elements, eight lanes a scale. As in apply_kernel.h, ordinary functions.

#include "../storage/blockwise8.h"
#include "../storage/philox.h"
#include "apply_kernel.h"
#include "slot_dtypes.h"
#include "stored_codes.h"
#include "stored_lanes.h"

namespace fusedopt {

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

// One lane's elements on their way through the update.
template <typename Update>
struct Lane {
  std::uint32_t first;
  int n;  // 0 beyond the end
  bool vector;
  LaneValues values[StoredTask<Update>::kSlots];
  std::uint32_t largest[kMaxStates];  // magnitude of each state
};

template <typename Element, typename Update>
FUSEDOPT_HD LaneBytes<Element> load_lane(const StoredTask<Update>& task, int pointer,
                                         const Lane<Update>& lane) {
  return load_lane<Element>(task.pointers[pointer], lane.first, lane.n, lane.vector);
}

template <typename Element, typename Update>
FUSEDOPT_HD void store_lane(const StoredTask<Update>& task, int pointer, const Lane<Update>& lane,
                            const LaneBytes<Element>& bytes) {
  store_lane<Element>(task.pointers[pointer], lane.first, lane.n, lane.vector, bytes);
}

template <typename Update>
FUSEDOPT_HD void load_floats(const StoredTask<Update>& task, int pointer, const Lane<Update>& lane,
                             LaneValues& to) {
  load_floats(task.dtype(pointer), task.pointers[pointer], lane.first, lane.n, lane.vector, to);
}

template <typename Update>
FUSEDOPT_HD void store_floats(const StoredTask<Update>& task, int pointer, const Lane<Update>& lane,
                              const LaneValues& from) {
  store_floats(task.dtype(pointer), task.pointers[pointer], lane.first, lane.n, lane.vector, from);
}

template <typename Update>
FUSEDOPT_HD void load_param(const StoredTask<Update>& task, Lane<Update>* lane) {
  LaneValues& param = lane->values[0];
  if (task.dtypes().master == Dtype::kInt16) {
    const auto high = load_lane<std::uint16_t>(task, 0, *lane);
    return join_masters(high, load_lane<std::uint16_t>(task, kMaster, *lane), param);
  }
  load_floats(task, 0, *lane, param);
  if (task.dtypes().master == kNone) return;
  LaneValues master, seen;
  unpack<float>(load_lane<float>(task, kMaster, *lane), master);
  const Dtype dtype = task.dtype(0);
  const LaneBytes<std::uint16_t> rounded = halves_of(dtype, master);
  if (dtype == Dtype::kBFloat16) {
    unpack<BFloat16>(rounded, seen);
  } else {
    unpack<Float16>(rounded, seen);
  }
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    param[i] = bits_from_float(seen[i]) == bits_from_float(param[i]) ? master[i] : param[i];
  }
}

template <typename Update>
FUSEDOPT_HD Random8 random_of(const StoredTask<Update>& task, const Lane<Update>& lane,
                              std::uint64_t key, std::uint64_t step) {
  return philox(key, step, static_cast<std::uint64_t>(task.begin + lane.first) / kLaneElements);
}

template <typename Update>
FUSEDOPT_HD void store_param(const StoredTask<Update>& task, const Lane<Update>& lane) {
  const LaneValues& param = lane.values[0];
  const SlotDtypes dtypes = task.dtypes();
  if (dtypes.master == Dtype::kInt16) {
    LaneBytes<std::uint16_t> high, low;
    split_masters(param, &high, &low);
    store_lane<std::uint16_t>(task, 0, lane, high);
    return store_lane<std::uint16_t>(task, kMaster, lane, low);
  }
  if (dtypes.master != kNone) store_floats(task, kMaster, lane, param);
  if (dtypes.stochastic) {
    const Random8 random = random_of(task, lane, task.rounding[0], task.rounding[1]);
    return store_lane<std::uint16_t>(task, 0, lane, rounded_stochastically(param, random));
  }
  store_floats(task, 0, lane, param);
}

template <typename Update>
FUSEDOPT_HD float* scale_of(const StoredTask<Update>& task, const Lane<Update>& lane, int state) {
  return static_cast<float*>(task.pointers[kScales + state]) + lane.first / kScaleElements;
}

template <typename Update>
FUSEDOPT_HD void load_state(const StoredTask<Update>& task, int state, Lane<Update>* lane) {
  const int pointer = 2 + state;
  const Dtype dtype = task.dtype(pointer);
  if (is_float(dtype)) return load_floats(task, pointer, *lane, lane->values[pointer]);
  float scale = 0;
  if (lane->n > 0) scale = float_from_bits(load_bytes<4>(scale_of(task, *lane, state)).words[0]);
  decode_lane(load_lane<std::uint8_t>(task, pointer, *lane), dtype, scale, lane->values[pointer]);
}

template <typename Update>
FUSEDOPT_HD void store_state(const StoredTask<Update>& task, int state, const Lane<Update>& lane) {
  const int pointer = 2 + state;
  const LaneValues& from = lane.values[pointer];
  if (is_float(task.dtype(pointer))) return store_floats(task, pointer, lane, from);
  const float scale = float_from_bits(lane.largest[state]);
  if (lane.n > 0 && lane.first % kScaleElements == 0) {
    store_bytes(scale_of(task, lane, state), Bytes<4>{{lane.largest[state]}});
  }
  const LaneCodes codes =
      task.dtype(pointer) == Dtype::kInt8
          ? encode_lane(from, scale)
          : encode_lane(from, scale, random_of(task, lane, kCodeKey + state, task.step));
  store_lane<std::uint8_t>(task, pointer, lane, codes);
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
  load_floats(task, 1, *lane, lane->values[1]);
  (load_state(task, S, lane), ...);
  const auto run = [&](const Update& update) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      update(lane->values[0][i], lane->values[1][i], lane->values[2 + S][i]...);
    }
  };
  if (!kWhole || task.update.has_penalty()) {
    run(task.update);
  } else {  // 11 instructions per element less for Adam
    Update update = task.update;
    update.drop_penalty();
    run(update);
  }
  FUSEDOPT_UNROLL
  for (int s = 0; s < Update::kNumStates; ++s) {
    lane->largest[s] = largest_magnitude(lane->values[2 + s], lane->n);
  }
}

// The rest, once the lanes of a scale know the largest magnitudes among all of them.
template <typename Update>
FUSEDOPT_HD void store(const StoredTask<Update>& task, const Lane<Update>& lane) {
  store_param(task, lane);
  FUSEDOPT_UNROLL
  for (int s = 0; s < Update::kNumStates; ++s) store_state(task, s, lane);
  if (task.dtypes().ema == kNone) return;
  LaneValues ema;
  load_floats(task, kEma, lane, ema);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) {
    ema[i] = ema[i] + task.ema_weight * (lane.values[0][i] - ema[i]);
  }
  store_floats(task, kEma, lane, ema);
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
