// The PTX instructions that reach beyond a thread's registers, and the loop that runs a program.
#include <cstdlib>
#include <mutex>

#include "cuda.h"
#include "hopper.h"
#include "ptx_machine.h"
#include "ptx_run.h"

namespace llama_fast::emulator {
namespace {

using M = PtxMachine;
using I = PtxInstruction;

[[noreturn]] void unknown(const I& i) { fail("PTX: this instruction is not modelled: %s", i.text.c_str()); }

// ---- memory
// ---------------------------------------------------------------------------------------------------------- A generic
// address of another space than global has one of these in its upper 16 bits.
constexpr int kWindowShift = 48;
enum Window : uint64_t { kParameter = 0xFFFD, kLocal = 0xFFFE, kShared = 0xFFFF };

enum class Space { generic, global, shared, local, parameter };

Space space_of(const I& i) {
  for (const std::string& word : i.words) {
    if (word == "global" || word == "const") return Space::global;
    if (word.compare(0, 6, "shared") == 0) return Space::shared;
    if (word == "local") return Space::local;
    if (word.compare(0, 5, "param") == 0) return Space::parameter;
  }
  return Space::generic;
}

char* resolve(M& m, Space space, uint64_t address, size_t bytes, bool write, const I& i) {
  if (space == Space::generic) {
    const uint64_t window = address >> kWindowShift, at = address & 0xFFFFFFFF;
    if (window == kShared) return resolve(m, Space::shared, at, bytes, write, i);
    if (window == kLocal) return resolve(m, Space::local, at, bytes, write, i);
    if (window == kParameter) return resolve(m, Space::parameter, at, bytes, write, i);
    space = Space::global;
  }
  const auto inside = [&](size_t size) {
    if (address > size || size - address < bytes) fail("PTX: outside its space: %s", i.text.c_str());
  };
  switch (space) {
    case Space::global:
      return static_cast<char*>(global_at(address, bytes, bytes, write ? "st.global" : "ld.global",
                                          write              ? Use::write
                                          : i.has("nc")      ? Use::constant
                                          : i.has("acquire") ? Use::atomic
                                                             : Use::read));
    case Space::shared: {
      const auto at = static_cast<uint32_t>(address), n = static_cast<uint32_t>(bytes);
      return write ? static_cast<char*>(shared_write(at, n, "st.shared"))
                   : const_cast<char*>(static_cast<const char*>(shared_read(at, n, "ld.shared")));
    }
    case Space::local:
      inside(m.local.size());
      return m.local.data() + address;
    default:
      inside(m.program.parameter_bytes);
      return const_cast<char*>(m.parameters) + address;
  }
}

void load(M& m, const I& i) {
  const PtxOperand& d = i.operands[0];
  const PtxType t = i.type();
  const auto each = static_cast<size_t>(size_of(t));
  const size_t count = d.kind == PtxOperand::vector ? d.parts.size() : 1;
  const uint64_t address = m.address(i.operands[1]);
  const char* from = resolve(m, space_of(i), address, each * count, false, i);
  for (size_t k = 0; k < count; ++k) {
    int64_t bits = 0;
    std::memcpy(&bits, from + k * each, each);
    const int spare = 64 - 8 * static_cast<int>(each);
    if (t == PtxType::s8 || t == PtxType::s16 || t == PtxType::s32)
      bits = static_cast<int64_t>(static_cast<uint64_t>(bits) << spare) >> spare;
    m.set<int64_t>(count > 1 ? d.parts[k] : d, bits);
  }
  if (i.has("acquire") && space_of(i) == Space::global) global_acquire(address);
}

void store(M& m, const I& i) {
  const PtxOperand& a = i.operands[1];
  const auto each = static_cast<size_t>(size_of(i.type()));
  const size_t count = a.kind == PtxOperand::vector ? a.parts.size() : 1;
  char* to = resolve(m, space_of(i), m.address(i.operands[0]), each * count, true, i);
  for (size_t k = 0; k < count; ++k) {
    const auto bits = m.get<uint64_t>(a.kind == PtxOperand::vector ? a.parts[k] : a);
    std::memcpy(to + k * each, &bits, each);
  }
}

// cvta: of a space's address to a generic one, and back (cvta.to)
void convert_address(M& m, const I& i) {
  const Space space = space_of(i);
  auto a = i.operands[1].kind == PtxOperand::symbol ? m.symbol(i.operands[1].name) : m.get<uint64_t>(i.operands[1]);
  if (space != Space::global) {
    const uint64_t window = space == Space::shared ? kShared : space == Space::local ? kLocal : kParameter;
    a = i.has("to") ? a & 0xFFFFFFFF : a | window << kWindowShift;
  }
  m.set<uint64_t>(i.operands[0], a);
}

template <class T>
void atomic_of(M& m, const I& i, bool gives_old) {
  const size_t at = gives_old ? 1 : 0;
  const T b = m.get<T>(i.operands[at + 1]);
  const Global<T> p(m.address(i.operands[at]), 0);
  if (i.has("release")) global_release(p.address());
  const T old = atomic_update(p, "atom.global", [&](T a) {
    if (i.has("add")) return static_cast<T>(a + b);
    if (i.has("max")) return a > b ? a : b;
    if (i.has("min")) return a < b ? a : b;
    if (i.has("exch")) return b;
    unknown(i);
  });
  if (gives_old) m.set<T>(i.operands[0], old);
}

void atomic(M& m, const I& i, bool gives_old) {
  if (space_of(i) != Space::global && space_of(i) != Space::generic) unknown(i);
  switch (i.type()) {
    case PtxType::f32:
      return atomic_of<float>(m, i, gives_old);
    case PtxType::s32:
      return atomic_of<int32_t>(m, i, gives_old);
    case PtxType::u32:
    case PtxType::b32:
      return atomic_of<uint32_t>(m, i, gives_old);
    case PtxType::u64:
    case PtxType::b64:
      return atomic_of<uint64_t>(m, i, gives_old);
    default:
      unknown(i);
  }
}

// ---- warps
// -----------------------------------------------------------------------------------------------------------
void bar(M& m, const I& i) {
  const auto operand = [&](size_t n) { return static_cast<int>(m.get<int32_t>(i.operands[n])); };
  if (i.has("warp")) return syncwarp(m.get<uint32_t>(i.operands[0]));
  barrier(operand(0), i.operands.size() > 1 ? operand(1) : 0, !i.has("arrive"));
}

void exchange(M& m, const I& i) {
  const auto value = m.get<uint32_t>(i.operands[1]), b = m.get<uint32_t>(i.operands[2]),
             c = m.get<uint32_t>(i.operands[3]);
  const int segment = static_cast<int>(c >> 8 & 31), me = lane(),
            last = (me & segment) | (static_cast<int>(c & 31) & ~segment);
  int from = 0;
  bool inside = true;
  if (i.has("up")) {
    from = me - static_cast<int>(b & 31);
    inside = from >= last;
  } else {
    if (i.has("down")) from = me + static_cast<int>(b & 31);
    if (i.has("bfly")) from = me ^ static_cast<int>(b & 31);
    if (i.has("idx")) from = (me & segment) | (static_cast<int>(b & 31) & ~segment);
    inside = from <= last;
  }
  const uint32_t d = shuffle("shfl.sync", m.get<uint32_t>(i.operands[4]), value, inside ? from : me);
  m.set<uint32_t>(i.operands[0], d);
  if (i.operands[0].second >= 0) m.registers[static_cast<size_t>(i.operands[0].second)] = inside;
}

void vote(M& m, const I& i) {
  const bool p = m.predicate(i.operands[1]);
  const auto mask = m.get<uint32_t>(i.operands[2]);
  const uint32_t all = ballot("vote.sync", mask, i.has("all") ? !p : p);
  m.set<uint64_t>(i.operands[0], i.has("ballot") ? all : i.has("any") ? all != 0 : all == 0);
}

void elect(M& m, const I& i) {
  const bool elected = elect_sync(m.get<uint32_t>(i.operands[1]));
  if (i.operands[0].second >= 0) m.registers[static_cast<size_t>(i.operands[0].second)] = elected;
}

// ---- matrix units
// ----------------------------------------------------------------------------------------------------
int count_of(const I& i) { return i.has("x4") ? 4 : i.has("x2") ? 2 : 1; }

const std::vector<PtxOperand>& parts(const PtxOperand& o, std::vector<PtxOperand>& single) {
  if (o.kind == PtxOperand::vector) return o.parts;
  single = {o};
  return single;
}

void load_matrix(M& m, const I& i) {
  uint32_t r[4];
  ldmatrix(count_of(i), i.has("trans"), r, static_cast<uint32_t>(m.address(i.operands[1])));
  std::vector<PtxOperand> single;
  const auto& to = parts(i.operands[0], single);
  for (size_t k = 0; k < to.size(); ++k) m.set<uint32_t>(to[k], r[k]);
}

void store_matrix(M& m, const I& i) {
  uint32_t r[4];
  std::vector<PtxOperand> single;
  const auto& from = parts(i.operands[1], single);
  for (size_t k = 0; k < from.size(); ++k) r[k] = m.get<uint32_t>(from[k]);
  stmatrix(count_of(i), i.has("trans"), static_cast<uint32_t>(m.address(i.operands[0])), r);
}

Half half_of(const I& i) { return i.has("bf16") ? Half::bf16 : Half::f16; }

void mma(M& m, const I& i) {
  if (!i.has("m16n8k16") || i.types.front() != PtxType::f32 || !(i.has("bf16") || i.has("f16"))) unknown(i);
  uint32_t a[4], b[2];
  float c[4], d[4];
  for (size_t k = 0; k < 4; ++k) a[k] = m.get<uint32_t>(i.operands[1].parts[k]);
  for (size_t k = 0; k < 2; ++k) b[k] = m.get<uint32_t>(i.operands[2].parts[k]);
  for (size_t k = 0; k < 4; ++k) c[k] = m.get<float>(i.operands[3].parts[k]);
  mma_m16n8k16(half_of(i), d, a, b, c);
  for (size_t k = 0; k < 4; ++k) m.set<float>(i.operands[0].parts[k], d[k]);
}

void warpgroup_mma(M& m, const I& i) {
  if (i.has("fence")) return wgmma_fence();
  if (i.has("commit_group")) return wgmma_commit_group();
  if (i.has("wait_group")) return wgmma_wait_group(m.get<int32_t>(i.operands[0]));
  const std::string& shape = i.words[3];
  if (!i.has("mma_async") || shape.compare(0, 4, "m64n") != 0 || i.types.front() != PtxType::f32) unknown(i);
  const auto operand = [&](size_t k) { return m.get<uint64_t>(i.operands[k]); };
  const auto& registers = i.operands[0].parts;
  const int n = std::atoi(shape.c_str() + 4);
  const bool from_registers = i.operands[1].kind == PtxOperand::vector;
  if (static_cast<int>(registers.size()) != n / 2 || operand(4) != 1 || operand(5) != 1) unknown(i);
  float d[128];
  uint32_t a[4];
  for (size_t k = 0; k < registers.size(); ++k) d[k] = m.get<float>(registers[k]);
  if (from_registers)
    for (size_t k = 0; k < 4; ++k) a[k] = m.get<uint32_t>(i.operands[1].parts[k]);
  const bool a_transposed = !from_registers && operand(6) != 0, b_transposed = operand(from_registers ? 6 : 7) != 0;
  wgmma_at_once(half_of(i), n, d, from_registers ? a : nullptr, from_registers ? 0 : operand(1), operand(2),
                m.predicate(i.operands[3]), a_transposed, b_transposed);
  for (size_t k = 0; k < registers.size(); ++k) m.set<float>(registers[k], d[k]);
}

// ---- asynchronous copies
// ---------------------------------------------------------------------------------------------
TensorMap map_at(M& m, const PtxOperand& o, const I& i) {
  TensorMap map;
  std::memcpy(&map, resolve(m, Space::generic, m.address(o), sizeof map, false, i), sizeof map);
  return map;
}

void tensor_copy(M& m, const I& i) {
  const bool is_load = i.operands[0].parts.empty();
  const PtxOperand& tensor = i.operands[is_load ? 1 : 0];
  std::array<int, 5> at{};
  for (size_t k = 0; k < tensor.parts.size(); ++k) at[k] = m.get<int32_t>(tensor.parts[k]);
  if (is_load)
    tma_load(static_cast<uint32_t>(m.address(i.operands[0])), map_at(m, tensor, i),
             static_cast<uint32_t>(m.address(i.operands[2])), at);
  else
    tma_store(map_at(m, tensor, i), static_cast<uint32_t>(m.address(i.operands[1])), at);
}

GlobalAddress global(M& m, const PtxOperand& o) { return Global<char>(m.address(o), 0); }
uint32_t shared(M& m, const PtxOperand& o) { return static_cast<uint32_t>(m.address(o)); }

void bulk_copy(M& m, const I& i) {
  if (i.has("commit_group")) return bulk_commit_group();
  if (i.has("wait_group")) return bulk_wait_group(m.get<int32_t>(i.operands[0]), i.has("read"));
  if (i.has("tensor")) return tensor_copy(m, i);
  const auto bytes = m.get<uint32_t>(i.operands[2]);
  if (i.operands.size() == 4)
    return bulk_load(shared(m, i.operands[0]), global(m, i.operands[1]), bytes, shared(m, i.operands[3]));
  if (i.op == "cp" && i.has("reduce") && !(i.has("add") && i.type() == PtxType::f32)) unknown(i);
  bulk_store(global(m, i.operands[0]), shared(m, i.operands[1]), bytes, i.has("reduce"));
}

void copy(M& m, const I& i) {
  if (i.has("bulk")) return bulk_copy(m, i);
  if (i.has("commit_group")) return cp_async_commit_group();
  if (i.has("wait_group")) return cp_async_wait_group(m.get<int32_t>(i.operands[0]));
  if (i.has("wait_all")) {
    cp_async_commit_group();
    return cp_async_wait_group(0);
  }
  if (m.get<uint32_t>(i.operands[2]) != 16) unknown(i);
  cp_async_16(shared(m, i.operands[0]), global(m, i.operands[1]),
              i.operands.size() > 3 ? m.get<uint32_t>(i.operands[3]) : 16);
}

void memory_barrier(M& m, const I& i) {
  const bool has_destination = i.operands[0].kind != PtxOperand::address;
  const uint32_t at = shared(m, i.operands[has_destination ? 1 : 0]);
  const auto last = [&] { return m.get<int32_t>(i.operands.back()); };
  if (i.has("init")) return mbarrier_init(at, last());
  if (i.has("inval")) return;
  if (i.has("try_wait") || i.has("test_wait")) {
    mbarrier_wait(at, m.get<uint32_t>(i.operands[2]));
    return m.set<uint64_t>(i.operands[0], 1);
  }
  if (i.has("arrive")) return mbarrier_arrive(at, i.has("expect_tx") ? last() : 0);
  if (i.has("expect_tx")) return mbarrier_expect_tx(at, last());
  unknown(i);
}

void fence(M&, const I& i) {
  if (i.has("mbarrier_init")) return fence_mbarrier_init();
  if (i.has("async") && !i.has("global")) return fence_proxy_async();
}

void nothing(M&, const I&) {}

const std::unordered_map<std::string, PtxHandler>& table() {
  static const auto all = [] {
    auto t = ptx_arithmetic();
    const std::unordered_map<std::string, PtxHandler> others = {
        {"ld", load},
        {"st", store},
        {"cvta", convert_address},
        {"atom", [](M& m, const I& i) { atomic(m, i, true); }},
        {"red", [](M& m, const I& i) { atomic(m, i, false); }},
        {"bar", bar},
        {"barrier", bar},
        {"shfl", exchange},
        {"vote", vote},
        {"elect", elect},
        {"ldmatrix", load_matrix},
        {"stmatrix", store_matrix},
        {"mma", mma},
        {"wgmma", warpgroup_mma},
        {"cp", copy},
        {"mbarrier", memory_barrier},
        {"fence", fence},
        {"membar", nothing},
        {"prefetch", nothing},
        {"griddepcontrol", nothing},
        {"setmaxnreg", [](M& m, const I& i) { set_max_registers(m.get<int32_t>(i.operands[0]), i.has("inc")); }},
        {"nanosleep", [](M&, const I&) { sleep(); }},
        {"bra", [](M& m, const I& i) { m.next = static_cast<size_t>(i.target); }},
        {"ret", [](M& m, const I&) { m.exited = true; }},
        {"exit", [](M& m, const I&) { m.exited = true; }},
        {"trap", [](M&, const I&) { fail("trap"); }},
    };
    t.insert(others.begin(), others.end());
    return t;
  }();
  return all;
}

std::mutex replacements_mutex;
std::unordered_map<const void*, const PtxProgram*> replacements;

}  // namespace

uint64_t PtxMachine::symbol(const std::string& name) const {
  const PtxProgram::Symbol& s = program.symbols.at(name);
  if (s.space == PtxProgram::Symbol::shared) return static_shared(&s, s.size, s.alignment);
  return s.space == PtxProgram::Symbol::dynamic_shared ? 0 : s.offset;
}

uint64_t PtxMachine::special(const std::string& name) const {
  const auto of = [&](auto v) -> uint64_t { return name.back() == 'x' ? v.x : name.back() == 'y' ? v.y : v.z; };
  if (name.compare(0, 5, "%tid.") == 0) return of(thread_index());
  if (name.compare(0, 6, "%ntid.") == 0) return of(block_shape());
  if (name.compare(0, 7, "%ctaid.") == 0) return of(block_index());
  if (name.compare(0, 8, "%nctaid.") == 0) return of(grid_shape());
  if (name == "%laneid") return static_cast<uint64_t>(lane());
  fail("PTX: %s is not modelled", name.c_str());
}

void run_ptx_thread(const PtxProgram& program, const void* parameters) {
  PtxMachine m{program, static_cast<const char*>(parameters),
               std::vector<uint64_t>(static_cast<size_t>(program.registers), 0xFFFFFFFFFFFFFFFF),
               std::vector<char>(program.local_bytes, '\xFF')};
  const auto& handlers = table();
  while (!m.exited && m.next < program.instructions.size()) {
    const I& i = program.instructions[m.next++];
    if (i.guard >= 0 && ((m.registers[static_cast<size_t>(i.guard)] & 1) != 0) == i.guard_negated) continue;
    const auto found = handlers.find(i.op);
    if (found == handlers.end()) unknown(i);
    found->second(m, i);
  }
}

void replace_kernel(const void* kernel, const PtxProgram* program) {
  const std::lock_guard<std::mutex> lock(replacements_mutex);
  if (program != nullptr)
    replacements[kernel] = program;
  else
    replacements.erase(kernel);
}

const PtxProgram* replacement_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(replacements_mutex);
  const auto found = replacements.find(kernel);
  return found == replacements.end() ? nullptr : found->second;
}

}  // namespace llama_fast::emulator
