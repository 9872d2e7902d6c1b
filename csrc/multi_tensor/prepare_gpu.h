#pragma once

// The kernels of the rules, and what they get of a step. ops/ instantiates prepare_gpu for each rule.

#include <cctype>
#include <cstring>
#include <string>
#include <type_traits>

#include "apply.h"
#include "device_kernel.h"

#if defined(FUSEDOPT_KERNELS_ON_HOST)
#include "update_on_host.h"
#endif

namespace fusedopt {

// AdamUpdate_float_true for fusedopt::AdamUpdate<float, true>.
inline std::string as_identifier(const std::string& type) {
  std::string name;
  for (const char c : type.substr(type.rfind("::") + 2)) {
    if (std::isalnum(static_cast<unsigned char>(c))) {
      name += c;
    } else if (c != ' ' && c != '>') {
      name += c == ',' || c == '<' ? '_' : c;
    }
  }
  return name;
}

template <typename Rule, typename Update>
DeviceKernel kernel_of(const std::string& suffix, const std::string& call, const std::string& types,
                       int min_blocks) {
  const std::string rule = type_name<Rule>(), update = type_name<Update>();
  std::string file = rule.substr(rule.rfind("::") + 2);
  for (char& c : file) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  DeviceKernel kernel("fusedopt_" + as_identifier(update) + suffix,
                      "#include \"multi_tensor/update_on_device.h\"\n"
                      "#include \"update_rules/" +
                          file + ".h\"\n",
                      "fusedopt::" + call + "<" + types + rule + ", " + update + ">", min_blocks);
  kernel.num_scalars = kNumScalars<Rule>;
  return kernel;
}

template <typename T, typename Rule, typename Update>
const DeviceKernel& update_kernel() {
  static const DeviceKernel kernel = [] {
    auto made = kernel_of<Rule, Update>("", "update_on_device", type_name<T>() + ", ", kMinBlocks);
    made.num_slots = 2 + Update::kNumStates;
#if defined(FUSEDOPT_KERNELS_ON_HOST)
    made.on_host = update_on_host<T, Rule, Update>;
#endif
    return made;
  }();
  return kernel;
}

// What a lane of stored_kernel.h has at a time, in words: its elements and the coefficients. An EMA comes
// after them.
template <typename Update>
int words_of_lane(const SlotDtypes& dtypes) {
  constexpr int kElements = 2 + Update::kNumStates;
  const int masters = dtypes.master == Dtype::kFloat32 ? 1 : 0;
  return kLaneElements * (kElements + masters) + static_cast<int>(sizeof(Update) / sizeof(float));
}

// Blocks of a kernel for stored values that fit a multiprocessor. Four, which is to say 64 registers, have
// no more instructions than three, with 80, and spill in none with up to the 44 words of Adam and RAdam;
// they do with the 45 of NAdam, with a third state, and with two and a float32 master (NVRTC 12.1, 13.0).
// Five spill for Lion. Without a bound NVRTC 12.1 takes 84 to 93 registers for AMSGrad in 8 bits.
template <typename Update>
int min_stored_blocks(const SlotDtypes& dtypes) {
  return words_of_lane<Update>(dtypes) <= 44 ? 4 : 3;
}

// One for each way in which values are stored: what it does not need is not in it. The loop of Adam with a
// split master and 8-bit state had 3,715 instructions for eight elements with all ways in it, and 1,298 with
// its own, with four blocks a multiprocessor as before (64 registers; NVRTC 13.0, sm_90).
template <typename Rule, typename Update>
const DeviceKernel& stored_kernel(const SlotDtypes& dtypes) {
  const auto& plain = update_kernel<float, Rule, Update>();
  return stored_kernel(plain, dtypes, [&](const std::string& suffix) {
    auto made = kernel_of<Rule, Update>(suffix, "stored_update_on_device", "",
                                        min_stored_blocks<Update>(dtypes));
    made.num_slots = kMaxPointers;
#if defined(FUSEDOPT_KERNELS_ON_HOST)
    made.on_host = stored_update_on_host<Rule, Update>;
#endif
    return made;
  });
}

template <typename Rule>
PreparedUpdate prepare_gpu(const Rule& rule, const Scalars& scalars, const StoredAs& stored,
                           bool on_device) {
  const SlotDtypes& dtypes = stored.dtypes;
  PreparedUpdate prepared;
  prepared.stored = stored;
  prepared.stored.step = scalars.step;
  prepared.on_device = on_device;
  const auto use = [&](const DeviceKernel& kernel, const auto& update) {
    prepared.device_kernel = &kernel;
    const auto keep = [&](const auto& what) {
      static_assert(sizeof(what) <= kMaxCoefficientBytes);
      prepared.num_bytes = sizeof(what);
      std::memcpy(prepared.coefficients, &what, sizeof(what));
    };
    const auto keep_as_stored = [&](const auto& what) {
      if (kernel.is_plain()) return keep(what);
      keep(Stored<std::decay_t<decltype(what)>>{what, prepared.stored});
    };
    if (on_device) {
      keep_as_stored(rule);
    } else {
      keep_as_stored(update);
    }
  };
  // What the device prepares is prepared here too, for its type alone.
  if (dtypes.all(Dtype::kFloat64)) {
    rule.template prepare<double>(scalars, [&](const auto& update) {
      use(update_kernel<double, Rule, std::decay_t<decltype(update)>>(), update);
    });
  } else {
    rule.template prepare<float>(scalars, [&](const auto& update) {
      using Update = std::decay_t<decltype(update)>;
      use(dtypes.is_plain() ? update_kernel<float, Rule, Update>()
                            : stored_kernel<Rule, Update>(dtypes),
          update);
    });
  }
  return prepared;
}

}  // namespace fusedopt
