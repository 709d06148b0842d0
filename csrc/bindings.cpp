// Python's view of the native ops (pybind11; no math). A tensor argument is any object with torch.Tensor's data_ptr(),
// dtype, shape and stride(); the module neither includes nor links torch. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>

#include "ops.h"

namespace py = pybind11;
using llama_fast::DType;
using llama_fast::Tensor;

namespace {

DType dtype_of(py::handle dtype) {
  // torch's dtype objects live as long as the process, so their addresses identify them.
  static auto& known = *new std::unordered_map<PyObject*, DType>;
  const auto found = known.find(dtype.ptr());
  if (found != known.end()) return found->second;
  const std::string name = py::str(dtype);
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

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Tensor> {
  PYBIND11_TYPE_CASTER(Tensor, const_name("Tensor"));

  bool load(handle src, bool) {
    if (src.is_none()) {
      value = Tensor{};
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
      return false;
    }
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (value.ndim > llama_fast::kMaxDims) throw std::invalid_argument("the native ops take at most 4 dimensions");
    for (int i = 0; i < value.ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    value.dtype = dtype_of(dtype);
    value.data = PyLong_AsVoidPtr(data_ptr.ptr());
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_native, module) {
  namespace cpu = llama_fast::cpu;
  module.doc() = "The native ops of llama_fast. Use llama_fast's public functions: these check nothing.";
  py::module_ m = module.def_submodule("cpu", "Kernels of csrc/cpu.");
  using unlocked = py::call_guard<py::gil_scoped_release>;
  using py::arg;

  m.def("isas", [] {
    py::list names;
    for (int i = 0; i < cpu::isa_count(); ++i) names.append(cpu::isa_name(i));
    return names;
  });
  m.def("isa", &cpu::isa);
  m.def("amd_family", &cpu::amd_family);
  m.def("set_isa", &cpu::set_isa, arg("name"));

  m.def("rms_norm_fwd", &cpu::rms_norm_fwd, arg("x"), arg("weight"), arg("eps"), arg("y"), arg("rstd"), unlocked());
  m.def("rms_norm_bwd", &cpu::rms_norm_bwd, arg("dy"), arg("x"), arg("weight"), arg("rstd"), arg("dx"), arg("dweight"),
        unlocked());
  m.def("add_rms_norm_fwd", &cpu::add_rms_norm_fwd, arg("x"), arg("residual"), arg("weight"), arg("eps"), arg("y"),
        arg("sum"), arg("rstd"), unlocked());
  m.def("add_rms_norm_bwd", &cpu::add_rms_norm_bwd, arg("dy"), arg("dsum"), arg("sum"), arg("weight"), arg("rstd"),
        arg("dx"), arg("dweight"), unlocked());
  m.def("swiglu_fwd", &cpu::swiglu_fwd, arg("gate"), arg("up"), arg("y"), unlocked());
  m.def("swiglu_bwd", &cpu::swiglu_bwd, arg("dy"), arg("gate"), arg("up"), arg("dgate"), arg("dup"), unlocked());
  m.def("rope_fwd", &cpu::rope_fwd, arg("q"), arg("k"), arg("cos"), arg("sin"), arg("interleaved"), arg("q_out"),
        arg("k_out"), unlocked());
  m.def("rope_bwd", &cpu::rope_bwd, arg("dq_out"), arg("dk_out"), arg("cos"), arg("sin"), arg("interleaved"), arg("dq"),
        arg("dk"), unlocked());
  m.def("attention_fwd", &cpu::attention_fwd, arg("q"), arg("k"), arg("v"), arg("cu_seqlens"), arg("scale"),
        arg("causal"), arg("window"), arg("out"), arg("lse"), unlocked());
  m.def("attention_bwd", &cpu::attention_bwd, arg("dout"), arg("q"), arg("k"), arg("v"), arg("out"), arg("lse"),
        arg("cu_seqlens"), arg("scale"), arg("causal"), arg("window"), arg("dq"), arg("dk"), arg("dv"), unlocked());
  m.def("gemv", &cpu::gemv, arg("x"), arg("weight"), arg("y"), unlocked());
  m.def("decode_block", &cpu::decode_block, arg("x"), arg("norm1"), arg("wq"), arg("wk"), arg("wv"), arg("wo"),
        arg("norm2"), arg("wgate"), arg("wup"), arg("wdown"), arg("cos"), arg("sin"), arg("k_cache"), arg("v_cache"),
        arg("used"), arg("eps"), arg("interleaved"), arg("window"), arg("y"), unlocked());
  m.def("cross_entropy_rows", &cpu::cross_entropy_rows, arg("logits"), arg("targets"), arg("row_scale"),
        arg("ignore_index"), arg("label_smoothing"), arg("z_loss"), arg("loss"), arg("lse"), unlocked());
}
