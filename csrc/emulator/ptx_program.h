// PTX text as a list of instructions, for running it on the emulator's fibers (ptx_run.h): PTX that a compiler made, so
// that what the emulator believes of an instruction is held against what others use it for.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace llama_fast::emulator {

enum class PtxType : uint8_t {
  none,
  pred,
  b8,
  u8,
  s8,
  b16,
  u16,
  s16,
  f16,
  bf16,
  b32,
  u32,
  s32,
  f32,
  b64,
  u64,
  s64,
  f64
};
int size_of(PtxType t);

struct PtxOperand {
  enum Kind : uint8_t { none, reg, immediate, symbol, special, vector, address } kind = none;
  bool negated = false;           // of a predicate
  int index = -1;                 // register; of an address the base register, or -1
  int second = -1;                // register of the predicate in d|p
  uint64_t value = 0;             // immediate; of an address the offset
  std::string name;               // symbol, special register
  std::vector<PtxOperand> parts;  // of a vector; of a tensor's address the coordinates
};

struct PtxInstruction {
  std::string text;                // as written, for errors
  std::string op;                  // mov, ld, mma, ...
  std::vector<std::string> words;  // what stood after the dots
  std::vector<PtxType> types;      // those of `words` that are types, in order
  std::vector<PtxOperand> operands;
  int guard = -1;  // predicate register
  bool guard_negated = false;
  int target = -1;  // of a branch
  bool has(const char* word) const;
  PtxType type() const { return types.empty() ? PtxType::none : types.back(); }
};

// One .entry of a module.
struct PtxProgram {
  std::string name;
  std::vector<PtxInstruction> instructions;
  int registers = 0;
  struct Symbol {
    enum Space : uint8_t { shared, dynamic_shared, local, parameter } space;
    size_t size = 0, alignment = 1, offset = 0;
  };
  std::map<std::string, Symbol> symbols;
  size_t parameter_bytes = 0, local_bytes = 0;
};

// Throws std::invalid_argument with the line where the text is not understood.
PtxProgram parse_ptx(const std::string& text, const std::string& entry);

}  // namespace llama_fast::emulator
