// The PTX instructions that work on a thread's registers alone.
#include <cfenv>
#include <cmath>

#include "ptx_machine.h"

namespace llama_fast::emulator {
namespace {

using M = PtxMachine;
using I = PtxInstruction;

// ---- types
// ----------------------------------------------------------------------------------------------------------- Calls
// f(T{}) with the arithmetic type of t; bits count as unsigned.
template <class F>
void with_type(const I& i, PtxType t, F&& f) {
  switch (t) {
    case PtxType::b8:
    case PtxType::u8:
      return f(uint8_t{});
    case PtxType::s8:
      return f(int8_t{});
    case PtxType::b16:
    case PtxType::u16:
      return f(uint16_t{});
    case PtxType::s16:
      return f(int16_t{});
    case PtxType::pred:
    case PtxType::b32:
    case PtxType::u32:
      return f(uint32_t{});
    case PtxType::s32:
      return f(int32_t{});
    case PtxType::f32:
      return f(float{});
    case PtxType::b64:
    case PtxType::u64:
      return f(uint64_t{});
    case PtxType::s64:
      return f(int64_t{});
    case PtxType::f64:
      return f(double{});
    default:
      fail("PTX: %s", i.text.c_str());
  }
}

template <class F>
void with_integer(const I& i, F&& f) {
  with_type(i, i.type(), [&](auto t) {
    if constexpr (std::is_integral_v<decltype(t)>)
      f(t);
    else
      fail("PTX: %s", i.text.c_str());
  });
}

// Integers wrap.
template <class T>
T wrapped_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  else
    return a + b;
}
template <class T>
T negated(T a) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  else
    return -a;
}

// d = f(a), d = f(a, b), d = f(a, b, c) in the instruction's type
template <class F>
void unary(M& m, const I& i, F&& f) {
  with_type(i, i.type(), [&](auto t) {
    using T = decltype(t);
    m.set<T>(i.operands[0], static_cast<T>(f(m.get<T>(i.operands[1]))));
  });
}
template <class F>
void binary(M& m, const I& i, F&& f) {
  with_type(i, i.type(), [&](auto t) {
    using T = decltype(t);
    m.set<T>(i.operands[0], static_cast<T>(f(m.get<T>(i.operands[1]), m.get<T>(i.operands[2]))));
  });
}

template <class T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

// a b of twice the width, for `wide`; its upper half, for `hi`; its lower half else.
void multiply(M& m, const I& i, bool add) {
  with_type(i, i.type(), [&](auto t) {
    using T = decltype(t);
    const T a = m.get<T>(i.operands[1]), b = m.get<T>(i.operands[2]);
    if constexpr (std::is_integral_v<T>) {
      if (i.has("wide")) {
        using W = Wide<T>;
        const W sum = static_cast<W>(a) * static_cast<W>(b) + (add ? m.get<W>(i.operands[3]) : W{0});
        return m.set<W>(i.operands[0], sum);
      }
      using Big = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      const Big product = static_cast<Big>(a) * static_cast<Big>(b);
      const T part = static_cast<T>(i.has("hi") ? product >> (8 * sizeof(T)) : product);
      m.set<T>(i.operands[0], static_cast<T>(part + (add ? m.get<T>(i.operands[3]) : T{0})));
    } else {
      m.set<T>(i.operands[0], a * b + (add ? m.get<T>(i.operands[3]) : T{0}));
    }
  });
}

void fused(M& m, const I& i) {
  const int mode = i.has("rm") ? FE_DOWNWARD : i.has("rp") ? FE_UPWARD : i.has("rz") ? FE_TOWARDZERO : FE_TONEAREST;
  const int before = std::fegetround();
  with_type(i, i.type(), [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_floating_point_v<T>) {
      volatile T a = m.get<T>(i.operands[1]), b = m.get<T>(i.operands[2]), c = m.get<T>(i.operands[3]);
      std::fesetround(mode);
      volatile T d = std::fma(a, b, c);
      std::fesetround(before);
      m.set<T>(i.operands[0], i.has("sat") ? std::fmin(std::fmax(d, T{0}), T{1}) : d);
    }
  });
}

void shift(M& m, const I& i, bool left) {
  const uint32_t by = m.get<uint32_t>(i.operands[2]);
  with_integer(i, [&](auto t) {
    using T = decltype(t);
    const T a = m.get<T>(i.operands[1]);
    const bool all = by >= 8 * sizeof(T);
    T d;
    if (left)
      d = all ? T{0} : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << by);
    else
      d = all ? static_cast<T>(std::is_signed_v<T> && a < 0 ? -1 : 0) : static_cast<T>(a >> by);
    m.set<T>(i.operands[0], d);
  });
}

template <class T>
bool compare(const I& i, T a, T b) {
  const auto is = [&](const char* word) { return i.has(word); };
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  if (is("num")) return !unordered;
  if (is("nan")) return unordered;
  if (is("eq") || is("equ")) return a == b || (is("equ") && unordered);
  if (is("ne") || is("neu")) return is("neu") ? unordered || a != b : !unordered && a != b;
  if (is("lt") || is("lo") || is("ltu")) return a < b || (is("ltu") && unordered);
  if (is("le") || is("ls") || is("leu")) return a <= b || (is("leu") && unordered);
  if (is("gt") || is("hi") || is("gtu")) return a > b || (is("gtu") && unordered);
  if (is("ge") || is("hs") || is("geu")) return a >= b || (is("geu") && unordered);
  fail("PTX: %s", i.text.c_str());
}

void set_predicate(M& m, const I& i) {
  bool p = false;
  with_type(i, i.type(), [&](auto t) {
    using T = decltype(t);
    p = compare<T>(i, m.get<T>(i.operands[1]), m.get<T>(i.operands[2]));
  });
  const auto combine = [&](bool x) {
    if (i.operands.size() < 4) return x;
    const bool c = m.predicate(i.operands[3]);
    return i.has("and") ? x && c : i.has("or") ? x || c : x != c;
  };
  const bool d = combine(p), q = combine(!p);
  if (i.operands[0].kind == PtxOperand::reg) m.set<uint64_t>(i.operands[0], d);
  if (i.operands[0].second >= 0) m.registers[static_cast<size_t>(i.operands[0].second)] = q;
}

// ---- conversions
// -----------------------------------------------------------------------------------------------------
double read_as_double(M& m, const PtxOperand& o, PtxType t) {
  double x = 0;
  if (t == PtxType::f16 || t == PtxType::bf16) {
    const Half half = t == PtxType::f16 ? Half::f16 : Half::bf16;
    return static_cast<double>(half_to_float(half, m.get<uint16_t>(o)));
  }
  if (t == PtxType::f32) x = static_cast<double>(m.get<float>(o));
  if (t == PtxType::f64) x = m.get<double>(o);
  return x;
}

bool is_float(PtxType t) { return t == PtxType::f16 || t == PtxType::bf16 || t == PtxType::f32 || t == PtxType::f64; }

void convert(M& m, const I& i) {
  const PtxOperand& d = i.operands[0];
  if (i.has("bf16x2") || i.has("f16x2")) {
    const Half half = i.has("bf16x2") ? Half::bf16 : Half::f16;
    return m.set<uint32_t>(d, cvt_f16x2(half, m.get<float>(i.operands[1]), m.get<float>(i.operands[2])));
  }
  if (i.types.size() != 2) fail("PTX: %s", i.text.c_str());
  const PtxType to = i.types[0], from = i.types[1];
  if (!is_float(from)) {
    with_type(i, from, [&](auto f) {
      const auto x = m.get<decltype(f)>(i.operands[1]);
      if (to == PtxType::f16 || to == PtxType::bf16) fail("PTX: %s", i.text.c_str());
      with_type(i, to, [&](auto t) { m.set<decltype(t)>(d, static_cast<decltype(t)>(x)); });
    });
    return;
  }
  double x = read_as_double(m, i.operands[1], from);
  if (i.has("sat")) x = std::fmin(std::fmax(x, 0.0), 1.0);
  if (i.has("rni")) x = std::nearbyint(x);
  if (i.has("rzi")) x = std::trunc(x);
  if (i.has("rmi")) x = std::floor(x);
  if (i.has("rpi")) x = std::ceil(x);
  if (to == PtxType::f16 || to == PtxType::bf16) {
    if (from == PtxType::f64) fail("PTX: %s", i.text.c_str());
    const Half half = to == PtxType::f16 ? Half::f16 : Half::bf16;
    return m.set<uint16_t>(d, float_to_half(half, static_cast<float>(x)));
  }
  with_type(i, to, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_integral_v<T>) {
      const double low = static_cast<double>(std::numeric_limits<T>::min());
      const double high = static_cast<double>(std::numeric_limits<T>::max());
      const T clamped = x <= low    ? std::numeric_limits<T>::min()
                        : x >= high ? std::numeric_limits<T>::max()
                                    : static_cast<T>(x);
      m.set<T>(d, std::isnan(x) ? T{0} : clamped);
    } else {
      m.set<T>(d, static_cast<T>(x));
    }
  });
}

// mov: also of two or more registers to one and back
void move(M& m, const I& i) {
  const PtxOperand &d = i.operands[0], &a = i.operands[1];
  const int bits = 8 * size_of(i.type());
  if (a.kind == PtxOperand::vector) {
    uint64_t whole = 0;
    const int each = bits / static_cast<int>(a.parts.size());
    for (size_t k = 0; k < a.parts.size(); ++k)
      whole |= (m.get<uint64_t>(a.parts[k]) & (each == 64 ? ~0ull : (1ull << each) - 1))
               << (each * static_cast<int>(k));
    m.set<uint64_t>(d, whole);
  } else if (d.kind == PtxOperand::vector) {
    const uint64_t whole = m.get<uint64_t>(a);
    const int each = bits / static_cast<int>(d.parts.size());
    for (size_t k = 0; k < d.parts.size(); ++k)
      m.set<uint64_t>(d.parts[k], whole >> (each * static_cast<int>(k)) & ((1ull << each) - 1));
  } else if (i.type() == PtxType::pred) {
    m.set<uint64_t>(d, m.predicate(a));
  } else {
    with_type(i, i.type() == PtxType::f16 || i.type() == PtxType::bf16 ? PtxType::b16 : i.type(),
              [&](auto t) { m.set<decltype(t)>(d, m.get<decltype(t)>(a)); });
  }
}

void logic(M& m, const I& i, uint64_t (*f)(uint64_t, uint64_t)) {
  if (i.type() == PtxType::pred)
    return m.set<uint64_t>(i.operands[0], f(m.predicate(i.operands[1]), m.predicate(i.operands[2])) & 1);
  with_integer(i, [&](auto t) {
    using T = decltype(t);
    m.set<T>(i.operands[0], static_cast<T>(f(m.get<std::make_unsigned_t<T>>(i.operands[1]),
                                             m.get<std::make_unsigned_t<T>>(i.operands[2]))));
  });
}

// ---- bits
// ------------------------------------------------------------------------------------------------------------
void bit_field_extract(M& m, const I& i) {
  const uint32_t at = m.get<uint32_t>(i.operands[2]) & 0xFF, length = m.get<uint32_t>(i.operands[3]) & 0xFF;
  with_integer(i, [&](auto t) {
    using T = decltype(t);
    constexpr uint32_t kBits = 8 * sizeof(T);
    const T a = m.get<T>(i.operands[1]);
    T d = 0;
    for (uint32_t k = 0; k < kBits; ++k) {
      const uint32_t from = k < length ? at + k : std::is_signed_v<T> && length > 0 ? at + length - 1 : kBits;
      const uint32_t place = std::is_signed_v<T> ? std::min(from, k < length || length > 0 ? kBits - 1 : from) : from;
      if (place < kBits) d = static_cast<T>(d | (static_cast<std::make_unsigned_t<T>>(a) >> place & 1u) << k);
    }
    m.set<T>(i.operands[0], d);
  });
}

void bit_field_insert(M& m, const I& i) {
  const uint64_t a = m.get<uint64_t>(i.operands[1]);
  uint64_t d = m.get<uint64_t>(i.operands[2]);
  const uint32_t at = m.get<uint32_t>(i.operands[3]) & 0xFF, length = m.get<uint32_t>(i.operands[4]) & 0xFF;
  const uint32_t bits = static_cast<uint32_t>(8 * size_of(i.type()));
  for (uint32_t k = 0; k < length && at + k < bits; ++k) d = (d & ~(1ull << (at + k))) | (a >> k & 1) << (at + k);
  with_integer(i, [&](auto t) { m.set<decltype(t)>(i.operands[0], static_cast<decltype(t)>(d)); });
}

void find_bit(M& m, const I& i) {
  with_integer(i, [&](auto t) {
    using T = decltype(t);
    T a = m.get<T>(i.operands[1]);
    if (std::is_signed_v<T> && a < 0) a = static_cast<T>(~a);
    int at = -1;
    for (int k = 0; k < static_cast<int>(8 * sizeof(T)); ++k)
      if ((static_cast<std::make_unsigned_t<T>>(a) >> k & 1) != 0) at = k;
    if (at >= 0 && i.has("shiftamt")) at = static_cast<int>(8 * sizeof(T)) - 1 - at;
    m.set<int32_t>(i.operands[0], at);
  });
}

void permute_bytes(M& m, const I& i) {
  const uint64_t both = m.get<uint32_t>(i.operands[1]) | static_cast<uint64_t>(m.get<uint32_t>(i.operands[2])) << 32;
  const uint32_t selector = m.get<uint32_t>(i.operands[3]);
  uint32_t d = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k) & 15;
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (s & 7)) & 0xFF);
    if ((s & 8) != 0) byte = (byte & 0x80) != 0 ? 0xFF : 0;
    d |= byte << (8 * k);
  }
  m.set<uint32_t>(i.operands[0], d);
}

void any_logic(M& m, const I& i) {
  const uint32_t a = m.get<uint32_t>(i.operands[1]), b = m.get<uint32_t>(i.operands[2]),
                 c = m.get<uint32_t>(i.operands[3]), table = m.get<uint32_t>(i.operands[4]);
  uint32_t d = 0;
  for (int k = 0; k < 32; ++k) d |= (table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k;
  m.set<uint32_t>(i.operands[0], d);
}

void funnel_shift(M& m, const I& i) {
  const uint64_t both = m.get<uint32_t>(i.operands[1]) | static_cast<uint64_t>(m.get<uint32_t>(i.operands[2])) << 32;
  uint32_t by = m.get<uint32_t>(i.operands[3]);
  by = i.has("clamp") ? std::min(by, 32u) : by & 31;
  m.set<uint32_t>(i.operands[0], static_cast<uint32_t>(i.has("l") ? both << by >> 32 : both >> by));
}

uint64_t reversed(uint64_t x, int bits) {
  uint64_t d = 0;
  for (int k = 0; k < bits; ++k) d |= (x >> k & 1) << (bits - 1 - k);
  return d;
}

template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(a, b);
  else
    return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(a, b);
  else
    return a > b ? a : b;
}

template <class T>
T magnitude(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fabs(a);
  else
    return a < T{0} ? negated(a) : a;
}
template <class T>
T quotient(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return b == 0                                           ? static_cast<T>(-1)
           : b == static_cast<T>(-1) && std::is_signed_v<T> ? negated(a)
                                                            : static_cast<T>(a / b);
  else
    return a / b;
}

template <class F>
void of_float(M& m, const I& i, F&& f) {
  if (i.type() == PtxType::f64)
    return m.set<double>(i.operands[0], static_cast<double>(f(m.get<double>(i.operands[1]))));
  m.set<float>(i.operands[0], static_cast<float>(f(m.get<float>(i.operands[1]))));
}

}  // namespace

// ---- the table
// -------------------------------------------------------------------------------------------------------
const std::unordered_map<std::string, PtxHandler>& ptx_arithmetic() {
  static const std::unordered_map<std::string, PtxHandler> table = {
      {"mov", move},
      {"cvt", convert},
      {"add", [](M& m, const I& i) { binary(m, i, [](auto a, auto b) { return wrapped_sum(a, b); }); }},
      {"sub", [](M& m, const I& i) { binary(m, i, [](auto a, auto b) { return wrapped_sum(a, negated(b)); }); }},
      {"mul", [](M& m, const I& i) { multiply(m, i, false); }},
      {"mad", [](M& m, const I& i) { is_float(i.type()) ? fused(m, i) : multiply(m, i, true); }},
      {"fma", fused},
      {"div", [](M& m, const I& i) { binary(m, i, [](auto a, auto b) { return quotient(a, b); }); }},
      {"rem",
       [](M& m, const I& i) {
         with_integer(i, [&](auto t) {
           using T = decltype(t);
           const T b = m.get<T>(i.operands[2]);
           m.set<T>(i.operands[0], b == 0 ? m.get<T>(i.operands[1]) : static_cast<T>(m.get<T>(i.operands[1]) % b));
         });
       }},
      {"min", [](M& m, const I& i) { binary(m, i, [](auto a, auto b) { return smaller(a, b); }); }},
      {"max", [](M& m, const I& i) { binary(m, i, [](auto a, auto b) { return larger(a, b); }); }},
      {"neg", [](M& m, const I& i) { unary(m, i, [](auto a) { return negated(a); }); }},
      {"abs", [](M& m, const I& i) { unary(m, i, [](auto a) { return magnitude(a); }); }},
      {"and", [](M& m, const I& i) { logic(m, i, [](uint64_t a, uint64_t b) { return a & b; }); }},
      {"or", [](M& m, const I& i) { logic(m, i, [](uint64_t a, uint64_t b) { return a | b; }); }},
      {"xor", [](M& m, const I& i) { logic(m, i, [](uint64_t a, uint64_t b) { return a ^ b; }); }},
      {"not",
       [](M& m, const I& i) {
         if (i.type() == PtxType::pred) return m.set<uint64_t>(i.operands[0], !m.predicate(i.operands[1]));
         with_integer(i, [&](auto t) {
           m.set<decltype(t)>(i.operands[0], static_cast<decltype(t)>(~m.get<decltype(t)>(i.operands[1])));
         });
       }},
      {"shl", [](M& m, const I& i) { shift(m, i, true); }},
      {"shr", [](M& m, const I& i) { shift(m, i, false); }},
      {"setp", set_predicate},
      {"selp",
       [](M& m, const I& i) {
         const PtxOperand& chosen = i.operands[m.predicate(i.operands[3]) ? 1 : 2];
         with_type(i, i.type() == PtxType::f16 || i.type() == PtxType::bf16 ? PtxType::b16 : i.type(),
                   [&](auto t) { m.set<decltype(t)>(i.operands[0], m.get<decltype(t)>(chosen)); });
       }},
      {"bfe", bit_field_extract},
      {"bfi", bit_field_insert},
      {"bfind", find_bit},
      {"prmt", permute_bytes},
      {"lop3", any_logic},
      {"shf", funnel_shift},
      {"brev",
       [](M& m, const I& i) {
         with_integer(i, [&](auto t) {
           m.set<decltype(t)>(i.operands[0],
                              static_cast<decltype(t)>(reversed(m.get<uint64_t>(i.operands[1]), 8 * sizeof t)));
         });
       }},
      {"popc",
       [](M& m, const I& i) {
         with_integer(i, [&](auto t) {
           m.set<uint32_t>(
               i.operands[0],
               static_cast<uint32_t>(__builtin_popcountll(static_cast<uint64_t>(m.get<decltype(t)>(i.operands[1])))));
         });
       }},
      {"clz",
       [](M& m, const I& i) {
         with_integer(i, [&](auto t) {
           const uint64_t a = static_cast<uint64_t>(m.get<decltype(t)>(i.operands[1]));
           m.set<uint32_t>(i.operands[0], a == 0 ? 8 * sizeof t
                                                 : static_cast<uint32_t>(__builtin_clzll(a)) -
                                                       (64 - 8 * static_cast<uint32_t>(sizeof t)));
         });
       }},
      {"ex2", [](M& m, const I& i) { of_float(m, i, [](auto a) { return std::exp2(a); }); }},
      {"lg2", [](M& m, const I& i) { of_float(m, i, [](auto a) { return std::log2(a); }); }},
      {"rcp", [](M& m, const I& i) { of_float(m, i, [](auto a) { return decltype(a){1} / a; }); }},
      {"sqrt", [](M& m, const I& i) { of_float(m, i, [](auto a) { return std::sqrt(a); }); }},
      {"rsqrt", [](M& m, const I& i) { of_float(m, i, [](auto a) { return decltype(a){1} / std::sqrt(a); }); }},
      {"sin", [](M& m, const I& i) { of_float(m, i, [](auto a) { return std::sin(a); }); }},
      {"cos", [](M& m, const I& i) { of_float(m, i, [](auto a) { return std::cos(a); }); }},
      {"tanh", [](M& m, const I& i) { of_float(m, i, [](auto a) { return std::tanh(a); }); }},
  };
  return table;
}

}  // namespace llama_fast::emulator
