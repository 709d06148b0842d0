#include "ptx_program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace llama_fast::emulator {
namespace {

const std::map<std::string, PtxType> kTypes = {{"pred", PtxType::pred}, {"b8", PtxType::b8},   {"u8", PtxType::u8},
                                               {"s8", PtxType::s8},     {"b16", PtxType::b16}, {"u16", PtxType::u16},
                                               {"s16", PtxType::s16},   {"f16", PtxType::f16}, {"bf16", PtxType::bf16},
                                               {"b32", PtxType::b32},   {"u32", PtxType::u32}, {"s32", PtxType::s32},
                                               {"f32", PtxType::f32},   {"b64", PtxType::b64}, {"u64", PtxType::u64},
                                               {"s64", PtxType::s64},   {"f64", PtxType::f64}};

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%'; }

class Parser {
 public:
  Parser(const std::string& text, const std::string& entry) : text_(without_comments(text)), entry_(entry) {}

  PtxProgram parse() {
    program_.name = entry_;
    module_symbols();
    const size_t at = find_entry();
    at_ = text_.find('(', at);
    const size_t open = text_.find('{', at);
    if (at_ < open) parameters();
    at_ = text_.find('{', at_ < open ? at_ : open);
    body();
    for (auto& [index, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) fail("no label " + label);
      program_.instructions[static_cast<size_t>(index)].target = found->second;
    }
    return std::move(program_);
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { throw std::invalid_argument("PTX of " + entry_ + ": " + why); }

  static std::string without_comments(const std::string& text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text.compare(i, 2, "//") == 0) {
        while (i < text.size() && text[i] != '\n') ++i;
        out += '\n';
      } else if (text.compare(i, 2, "/*") == 0) {
        i = text.find("*/", i) + 1;
      } else {
        out += text[i];
      }
    }
    return out;
  }

  size_t find_entry() const {
    for (size_t at = 0; (at = text_.find(".entry", at)) != std::string::npos; ++at) {
      size_t i = at + 6;
      while (std::isspace(static_cast<unsigned char>(text_[i])) != 0) ++i;
      if (text_.compare(i, entry_.size(), entry_) == 0 && !is_name(text_[i + entry_.size()])) return i;
    }
    fail("there is no such entry");
  }

  void space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) ++at_;
  }
  void skip_line() { at_ = text_.find('\n', at_); }
  std::string until(char c) {
    const size_t end = text_.find(c, at_);
    if (end == std::string::npos) fail(std::string("no ") + c);
    std::string part = text_.substr(at_, end - at_);
    at_ = end + 1;
    return part;
  }

  // ".shared .align 16 .b8 name[128]", ".param .u64 name": the name, and its size and alignment.
  static std::pair<std::string, PtxProgram::Symbol> declaration(const std::string& text) {
    PtxProgram::Symbol symbol{};
    size_t element = 1, count = 1;
    bool array = false, pointer = false;
    std::string name, word;
    for (size_t i = 0; i <= text.size(); ++i) {
      const char c = i < text.size() ? text[i] : ' ';
      if (is_name(c) || c == '.') {
        word += c;
        continue;
      }
      pointer = pointer || word == ".ptr";  // from here on of what it points to
      if (word == ".align" && !pointer) {
        symbol.alignment = std::strtoul(text.c_str() + i, nullptr, 10);
      } else if (word.size() > 1 && word[0] == '.' && kTypes.count(word.substr(1)) != 0) {
        element = static_cast<size_t>(size_of(kTypes.at(word.substr(1))));
        symbol.alignment = std::max(symbol.alignment, element);
      } else if (!word.empty() && word[0] != '.' && std::isdigit(static_cast<unsigned char>(word[0])) == 0) {
        name = word;
      }
      word.clear();
      if (c == '[') {
        array = true;
        count = std::strtoul(text.c_str() + i + 1, nullptr, 10);
        break;
      }
    }
    symbol.size = array ? element * count : element;
    return {name, symbol};
  }

  void module_symbols() {
    size_t depth = 0;
    for (size_t i = 0; i < text_.size(); ++i) {
      if (text_[i] == '{') ++depth;
      if (text_[i] == '}') --depth;
      if (depth != 0 || text_.compare(i, 7, ".shared") != 0) continue;
      auto [name, symbol] = declaration(text_.substr(i, text_.find(';', i) - i));
      symbol.space = symbol.size == 0 ? PtxProgram::Symbol::dynamic_shared : PtxProgram::Symbol::shared;
      program_.symbols[name] = symbol;
    }
  }

  void place(PtxProgram::Symbol& symbol, size_t& bytes) {
    symbol.offset = (bytes + symbol.alignment - 1) / symbol.alignment * symbol.alignment;
    bytes = symbol.offset + symbol.size;
  }

  void parameters() {
    ++at_;
    const std::string list = until(')');
    for (size_t begin = 0; begin < list.size();) {
      const size_t comma = std::min(list.find(',', begin), list.size());
      auto [name, symbol] = declaration(list.substr(begin, comma - begin));
      begin = comma + 1;
      if (name.empty()) continue;
      symbol.space = PtxProgram::Symbol::parameter;
      place(symbol, program_.parameter_bytes);
      program_.symbols[name] = symbol;
    }
  }

  void body() {
    ++at_;
    scopes_.emplace_back();
    while (!scopes_.empty()) {
      space();
      const char c = text_[at_];
      if (c == '{') {
        ++at_;
        scopes_.emplace_back();
      } else if (c == '}') {
        ++at_;
        scopes_.pop_back();
      } else if (c == '.') {
        directive();
      } else if (c == ';') {
        ++at_;
      } else {
        statement();
      }
    }
  }

  void directive() {
    for (const char* whole_line : {".loc", ".file", ".section"})
      if (text_.compare(at_, std::strlen(whole_line), whole_line) == 0) return skip_line();
    const std::string text = until(';');
    if (text.compare(0, 4, ".reg") == 0) {
      // ".reg .b32 %r<9>, x": names are given registers when they are met; those without <> are of this scope
      for (size_t i = text.find(' ', 5); i < text.size();) {
        while (i < text.size() && !is_name(text[i])) ++i;
        size_t end = i;
        while (end < text.size() && is_name(text[end])) ++end;
        if (end > i && (end == text.size() || text[end] != '<'))
          scopes_.back()[text.substr(i, end - i)] = program_.registers++;
        i = text.find(',', end);
      }
    } else if (text.compare(0, 7, ".shared") == 0 || text.compare(0, 6, ".local") == 0) {
      auto [name, symbol] = declaration(text);
      symbol.space = text[1] == 's' ? PtxProgram::Symbol::shared : PtxProgram::Symbol::local;
      if (text[1] == 'l') place(symbol, program_.local_bytes);
      program_.symbols[name] = symbol;
    } else if (text.compare(0, 7, ".pragma") != 0) {
      fail("directive " + text);
    }
  }

  int find_register(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    if (name[0] != '%') return -1;
    return scopes_.front()[name] = program_.registers++;
  }

  static bool is_special(const std::string& name) {
    for (const char* known : {"%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid", "%clock", "%globaltimer",
                              "%cluster", "%is_explicit", "%nwarpid", "%smid", "%lanemask"})
      if (name.compare(0, std::strlen(known), known) == 0) return true;
    return false;
  }

  PtxOperand operand(std::string text) {
    while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0) text.pop_back();
    text.erase(0, text.find_first_not_of(" \t\n"));
    PtxOperand o;
    if (text.empty()) fail("an empty operand");
    if (text[0] == '{') {
      o.kind = PtxOperand::vector;
      for (const std::string& part : split(text.substr(1, text.size() - 2))) o.parts.push_back(operand(part));
      return o;
    }
    if (text[0] == '[') {
      const std::vector<std::string> parts = split(text.substr(1, text.size() - 2));
      o = address(parts[0]);
      if (parts.size() > 1) o.parts = operand(parts[1]).parts;
      return o;
    }
    if (text[0] == '!') {
      o = operand(text.substr(1));
      o.negated = true;
      return o;
    }
    const size_t bar = text.find('|');
    if (bar != std::string::npos) {
      o = operand(text.substr(0, bar));
      o.second = find_register(operand_name(text.substr(bar + 1)));
      return o;
    }
    if (text == "_") return o;
    if (std::isdigit(static_cast<unsigned char>(text[0])) != 0 || text[0] == '-') {
      o.kind = PtxOperand::immediate;
      o.value = number(text);
      return o;
    }
    if (is_special(text)) {
      o.kind = PtxOperand::special;
      o.name = text;
      return o;
    }
    if (program_.symbols.count(text) != 0) {
      o.kind = PtxOperand::symbol;
      o.name = text;
      return o;
    }
    o.kind = PtxOperand::reg;
    o.index = find_register(text);
    if (o.index < 0) fail("operand " + text);
    return o;
  }

  static std::string operand_name(const std::string& text) {
    const size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n");
    return text.substr(begin, end - begin + 1);
  }

  static uint64_t number(const std::string& text) {
    if (text.compare(0, 2, "0f") == 0 || text.compare(0, 2, "0F") == 0 || text.compare(0, 2, "0d") == 0 ||
        text.compare(0, 2, "0D") == 0)
      return std::strtoull(text.c_str() + 2, nullptr, 16);
    return text[0] == '-' ? static_cast<uint64_t>(std::strtoll(text.c_str(), nullptr, 0))
                          : std::strtoull(text.c_str(), nullptr, 0);
  }

  // register, symbol or number, and an offset
  PtxOperand address(const std::string& text) {
    PtxOperand o;
    o.kind = PtxOperand::address;
    std::string base = operand_name(text);
    const size_t sign = base.find_first_of("+-", 1);
    if (sign != std::string::npos) {
      std::string offset = base.substr(sign);
      if (offset.compare(0, 2, "+-") == 0) offset.erase(0, 1);
      o.value = static_cast<uint64_t>(std::strtoll(offset.c_str(), nullptr, 0));
      base = operand_name(base.substr(0, sign));
    }
    if (program_.symbols.count(base) != 0)
      o.name = base;
    else if (std::isdigit(static_cast<unsigned char>(base[0])) != 0)
      o.value += number(base);
    else if ((o.index = find_register(base)) < 0)
      fail("address " + text);
    return o;
  }

  // At commas that stand outside of brackets.
  static std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    int depth = 0;
    size_t begin = 0;
    for (size_t i = 0; i <= text.size(); ++i) {
      const char c = i < text.size() ? text[i] : ',';
      depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
      if (c != ',' || depth != 0) continue;
      if (i > begin) parts.push_back(text.substr(begin, i - begin));
      begin = i + 1;
    }
    return parts;
  }

  void statement() {
    size_t end = at_;
    while (is_name(text_[end])) ++end;
    size_t colon = end;
    while (std::isspace(static_cast<unsigned char>(text_[colon])) != 0) ++colon;
    if (text_[colon] == ':' && text_[colon + 1] != ':') {
      labels_[text_.substr(at_, end - at_)] = static_cast<int>(program_.instructions.size());
      at_ = colon + 1;
      return;
    }
    PtxInstruction i;
    i.text = until(';');
    std::string rest = i.text;
    if (rest[0] == '@') {
      size_t begin = 1;
      i.guard_negated = rest[1] == '!';
      begin += i.guard_negated;
      size_t stop = begin;
      while (is_name(rest[stop])) ++stop;
      i.guard = find_register(rest.substr(begin, stop - begin));
      rest.erase(0, rest.find_first_not_of(" \t\n", stop));
    }
    const size_t space = std::min(rest.find_first_of(" \t\n"), rest.size());
    words(rest.substr(0, space), i);
    const std::string operands = rest.substr(space);
    if (i.op == "bra") {
      branches_.emplace_back(static_cast<int>(program_.instructions.size()), operand_name(operands));
    } else if (operands.find_first_not_of(" \t\n") != std::string::npos) {
      for (const std::string& part : split(operands)) i.operands.push_back(operand(part));
    }
    program_.instructions.push_back(std::move(i));
  }

  void words(const std::string& mnemonic, PtxInstruction& i) {
    for (size_t begin = 0; begin < mnemonic.size();) {
      const size_t dot = std::min(mnemonic.find('.', begin), mnemonic.size());
      const std::string word = mnemonic.substr(begin, dot - begin);
      begin = dot + 1;
      if (i.op.empty()) {
        i.op = word;
        continue;
      }
      i.words.push_back(word);
      const auto type = kTypes.find(word);
      if (type != kTypes.end()) i.types.push_back(type->second);
    }
  }

  std::string text_, entry_;
  size_t at_ = 0;
  PtxProgram program_;
  std::vector<std::map<std::string, int>> scopes_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<int, std::string>> branches_;
};

}  // namespace

int size_of(PtxType t) {
  switch (t) {
    case PtxType::pred:
    case PtxType::b8:
    case PtxType::u8:
    case PtxType::s8:
      return 1;
    case PtxType::b16:
    case PtxType::u16:
    case PtxType::s16:
    case PtxType::f16:
    case PtxType::bf16:
      return 2;
    case PtxType::b64:
    case PtxType::u64:
    case PtxType::s64:
    case PtxType::f64:
      return 8;
    default:
      return 4;
  }
}

bool PtxInstruction::has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }

PtxProgram parse_ptx(const std::string& text, const std::string& entry) { return Parser(text, entry).parse(); }

}  // namespace llama_fast::emulator
