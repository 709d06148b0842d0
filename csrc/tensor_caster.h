// A tensor argument of the native modules: any object with torch.Tensor's data_ptr(), dtype, shape and stride().
// Neither includes nor links torch.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <unordered_map>

#include "ops.h"

namespace llama_fast {

inline DType dtype_of(pybind11::handle dtype) {
  // torch's dtype objects live as long as the process, so their addresses identify them.
  static auto& known = *new std::unordered_map<PyObject*, DType>;
  const auto found = known.find(dtype.ptr());
  if (found != known.end()) return found->second;
  const std::string name = pybind11::str(dtype);
  DType d;
  if (name == "torch.float32")
    d = DType::f32;
  else if (name == "torch.bfloat16")
    d = DType::bf16;
  else if (name == "torch.float16")
    d = DType::f16;
  else if (name == "torch.int32")
    d = DType::i32;
  else if (name == "torch.int64")
    d = DType::i64;
  else
    throw std::invalid_argument("dtype " + name + ": the native ops take float32, bfloat16, float16, int32 and int64");
  known.emplace(dtype.ptr(), d);
  return d;
}

}  // namespace llama_fast

namespace pybind11::detail {

template <>
struct type_caster<llama_fast::Tensor> {
  PYBIND11_TYPE_CASTER(llama_fast::Tensor, const_name("Tensor"));

  bool load(handle src, bool) {
    if (src.is_none()) {
      value = llama_fast::Tensor{};
      return true;
    }
    // Interned names and no arguments tuple: a call has a handful of tensors, and a decode step a hundred calls.
    static PyObject* const names[] = {PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride"),
                                      PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("data_ptr")};
    const auto shape = reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), names[0]));
    const auto stride = reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), names[1]));
    const auto dtype = reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), names[2]));
    const auto data_ptr = reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), names[3]));
    if (!shape || !stride || !dtype || !data_ptr || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr())) {
      PyErr_Clear();
      throw std::invalid_argument("the native ops take dense tensors, which have a shape, strides and memory");
    }
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (value.ndim > llama_fast::kMaxDims) throw std::invalid_argument("the native ops take at most 4 dimensions");
    for (int i = 0; i < value.ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    value.dtype = llama_fast::dtype_of(dtype);
    value.data = PyLong_AsVoidPtr(data_ptr.ptr());
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
