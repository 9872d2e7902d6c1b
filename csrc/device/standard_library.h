// What the kernels need of the standard library, for NVRTC, which has none. Its own functions are at
// global scope.
#pragma once

namespace std {

using size_t = decltype(sizeof(0));
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
enum class byte : unsigned char {};

static_assert(sizeof(int64_t) == 8 && sizeof(uintptr_t) == sizeof(void*), "Linux, 64 bits");

using ::copysign;
using ::fabs;
using ::fmax;
using ::isinf;
using ::memcpy;
using ::pow;
using ::sqrt;

template <bool, typename Then, typename>
struct conditional {
  using type = Then;
};
template <typename Then, typename Else>
struct conditional<false, Then, Else> {
  using type = Else;
};
template <bool kIf, typename Then, typename Else>
using conditional_t = typename conditional<kIf, Then, Else>::type;

template <typename A, typename B>
constexpr bool is_same_v = false;
template <typename A>
constexpr bool is_same_v<A, A> = true;

// Of objects: nothing here decays from an array or a function.
template <typename T>
struct decay {
  using type = T;
};
template <typename T>
struct decay<T&> : decay<T> {};
template <typename T>
struct decay<T&&> : decay<T> {};
template <typename T>
struct decay<const T> : decay<T> {};
template <typename T>
using decay_t = typename decay<T>::type;

template <typename T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float max() { return 0x1.fffffep127f; }
};
template <>
struct numeric_limits<double> {
  static constexpr double max() { return 0x1.fffffffffffffp1023; }
};

template <size_t...>
struct index_sequence {};
template <size_t kCount, size_t... kRest>
struct sequence_to : sequence_to<kCount - 1, kCount - 1, kRest...> {};
template <size_t... kAll>
struct sequence_to<0, kAll...> {
  using type = index_sequence<kAll...>;
};
template <size_t kCount>
using make_index_sequence = typename sequence_to<kCount>::type;

}  // namespace std
