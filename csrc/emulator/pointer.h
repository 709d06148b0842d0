// What a pointer is in an emulated build: an address whose every use is checked. On the device `Global<T>` and
// `Shared<T>` are T* (csrc/cuda/device.cuh); here they have a pointer's operators, and a reference that they give
// converts to T and takes a T. So a kernel says `T v = p[i]`, not `auto v = p[i]`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.h"

namespace llama_fast::emulator {

struct GlobalSpace {
  using Address = uint64_t;
  template <class T>
  static T load(Address a) {
    return load<T>(a, "ld.global", Use::read);
  }
  template <class T>
  static T load(Address a, const char* op, Use use) {
    T value;
    std::memcpy(&value, global_at(a, sizeof(T), alignof(T), op, use), sizeof(T));
    return value;
  }
  template <class T>
  static void store(Address a, const T& value) {
    std::memcpy(global_at(a, sizeof(T), alignof(T), "st.global", Use::write), &value, sizeof(T));
  }
};

struct SharedSpace {
  using Address = uint32_t;
  template <class T>
  static T load(Address a) {
    T value;
    std::memcpy(&value, shared_read(a, sizeof(T), "ld.shared"), sizeof(T));
    return value;
  }
  template <class T>
  static void store(Address a, const T& value) {
    std::memcpy(shared_write(a, sizeof(T), "st.shared"), &value, sizeof(T));
  }
};

// An lvalue in one of the spaces.
template <class Space, class T>
class Reference {
 public:
  explicit Reference(typename Space::Address address) : address_(address) {}
  Reference(const Reference&) = default;
  operator T() const { return Space::template load<T>(address_); }  // NOLINT: as a T& would
  Reference& operator=(const T& value) {
    Space::template store<T>(address_, value);
    return *this;
  }
  Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }
  Reference& operator+=(const T& value) { return *this = static_cast<T>(*this) + value; }
  Reference& operator*=(const T& value) { return *this = static_cast<T>(*this) * value; }

 private:
  typename Space::Address address_;
};

template <class Space, class T>
class Pointer {
  using Value = std::remove_const_t<T>;
  using Address = typename Space::Address;

 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}                                                                  // NOLINT
  Pointer(T* mapped) : address_(static_cast<Address>(reinterpret_cast<uintptr_t>(mapped))) {  // NOLINT
    static_assert(std::is_same_v<Space, GlobalSpace>, "shared memory has no host pointers");
  }
  explicit Pointer(Address address, int) : address_(address) {}
  operator Pointer<Space, const T>() const { return Pointer<Space, const T>(address_, 0); }  // NOLINT

  auto operator[](int64_t i) const {
    const Address a = address_ + static_cast<Address>(i * static_cast<int64_t>(sizeof(T)));
    if constexpr (std::is_const_v<T>)
      return Space::template load<Value>(a);
    else
      return Reference<Space, T>(a);
  }
  auto operator*() const { return (*this)[0]; }
  Pointer operator+(int64_t i) const {
    return Pointer(address_ + static_cast<Address>(i * static_cast<int64_t>(sizeof(T))), 0);
  }
  Pointer operator-(int64_t i) const { return *this + -i; }
  Pointer& operator+=(int64_t i) { return *this = *this + i; }
  int64_t operator-(Pointer other) const {
    return static_cast<int64_t>(address_ - other.address_) / static_cast<int64_t>(sizeof(T));
  }
  bool operator==(Pointer other) const { return address_ == other.address_; }
  bool operator!=(Pointer other) const { return address_ != other.address_; }
  explicit operator bool() const { return address_ != 0; }
  Address address() const { return address_; }

 private:
  Address address_ = 0;
};

template <class T>
using Global = Pointer<GlobalSpace, T>;
template <class T>
using Shared = Pointer<SharedSpace, T>;

// Any Global<T>: the address operand of an instruction.
struct GlobalAddress {
  template <class T>
  GlobalAddress(Global<T> p) : value(p.address()) {}  // NOLINT: as void* would
  uint64_t value;
};

}  // namespace llama_fast::emulator
