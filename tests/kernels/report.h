// What the entry points of the test kernels share: a fault's report as a text, "" where there was none.
#pragma once

#include <exception>
#include <string>

#include "emulator/memory.h"

using llama_fast::emulator::Mapping;

template <class F>
const char* report(F&& run) {
  static std::string text;
  text.clear();
  try {
    run();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}
