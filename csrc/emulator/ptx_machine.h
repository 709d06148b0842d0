// A thread of a running PTX program: what the handlers of ptx_arithmetic.cpp and ptx_instructions.cpp work on.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "instructions.h"
#include "ptx_program.h"

namespace llama_fast::emulator {

struct PtxMachine {
  const PtxProgram& program;
  const char* parameters;
  std::vector<uint64_t> registers;
  std::vector<char> local;
  size_t next = 0;  // instruction
  bool exited = false;

  uint64_t symbol(const std::string& name) const;   // its address in its space
  uint64_t special(const std::string& name) const;  // %tid.x and the like

  template <class T>
  T get(const PtxOperand& o) const {
    uint64_t bits = 0;
    if (o.kind == PtxOperand::reg)
      bits = registers[static_cast<size_t>(o.index)];
    else if (o.kind == PtxOperand::immediate)
      bits = o.value;
    else if (o.kind == PtxOperand::special)
      bits = special(o.name);
    else if (o.kind == PtxOperand::symbol)
      bits = symbol(o.name);
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  template <class T>
  void set(const PtxOperand& o, T value) {
    if (o.kind != PtxOperand::reg) return;  // "_"
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    registers[static_cast<size_t>(o.index)] = bits;
  }
  bool predicate(const PtxOperand& o) const { return ((get<uint64_t>(o) & 1) != 0) != o.negated; }
  uint64_t address(const PtxOperand& o) const {
    return o.value + (o.index >= 0 ? registers[static_cast<size_t>(o.index)] : o.name.empty() ? 0 : symbol(o.name));
  }
};

using PtxHandler = void (*)(PtxMachine&, const PtxInstruction&);
const std::unordered_map<std::string, PtxHandler>& ptx_arithmetic();

}  // namespace llama_fast::emulator
