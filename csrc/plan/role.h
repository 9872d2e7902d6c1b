#pragma once

// What a tensor is to the parameter that it belongs to: the one index of records, recognition,
// verification and work.

#include <cstdint>

#include "../multi_tensor/tensor_view.h"
#include "../update_rules/rule.h"

namespace fusedopt {

// Up to kStep the number is also where the pointer stands among those of a task.
enum class Role : std::uint8_t {
  kParam,
  kGrad,
  kState,  // the first of kMaxStates: see state()
  kMaster = fusedopt::kMaster,
  kRounding = fusedopt::kRounding,
  kEma = fusedopt::kEma,
  kScale = fusedopt::kScales,  // the first of kMaxStates: see scale()
  kStep = kMaxPointers,        // the first of Scalars::kMost, which are one number each
};

constexpr int kNumRoles = kMaxPointers + Scalars::kMost;

constexpr int position(Role role) { return static_cast<int>(role); }
constexpr Role state(int s) { return static_cast<Role>(position(Role::kState) + s); }
constexpr Role scale(int s) { return static_cast<Role>(position(Role::kScale) + s); }
constexpr Role scalar(int s) { return static_cast<Role>(position(Role::kStep) + s); }
// In the order in which Python names them.
constexpr Role extra(int e) { return static_cast<Role>(kMaxSlots + e); }

class Roles {
 public:
  constexpr Roles() = default;
  constexpr Roles(Role role) : bits_(1u << position(role)) {}
  static constexpr Roles range(Role first, int count) {
    return Roles(((1u << count) - 1) << position(first));
  }

  constexpr bool empty() const { return bits_ == 0; }
  constexpr bool has(Role role) const { return (bits_ >> position(role) & 1u) != 0; }
  constexpr bool has(Roles roles) const { return (roles.bits_ & ~bits_) == 0; }
  constexpr Roles operator|(Roles other) const { return Roles(bits_ | other.bits_); }
  constexpr Roles operator&(Roles other) const { return Roles(bits_ & other.bits_); }
  void add(Role role) { bits_ |= 1u << position(role); }

  // In ascending order, until one is false.
  template <typename Is>
  bool all_of(Is&& is) const {
    for (std::uint32_t rest = bits_; rest != 0; rest &= rest - 1) {
      if (!is(static_cast<Role>(__builtin_ctz(rest)))) return false;
    }
    return true;
  }
  template <typename Use>
  void for_each(Use&& use) const {
    all_of([&](Role role) { return use(role), true; });
  }

 private:
  explicit constexpr Roles(std::uint32_t bits) : bits_(bits) {}
  std::uint32_t bits_ = 0;
};

constexpr Roles kStates = Roles::range(Role::kState, kMaxStates);
constexpr Roles kExtras = Roles::range(Role::kMaster, kNumExtras);
constexpr Roles kScalars = Roles::range(Role::kStep, Scalars::kMost);
// One element for each of the parameter's; the other extras are lists.
constexpr Roles kElementwise = kStates | Role::kParam | Role::kMaster | Role::kEma;
constexpr bool is_elementwise(Role role) { return kElementwise.has(role); }

}  // namespace fusedopt
