// Python's view of the CUDA ops (pybind11; no math), of the device and of the emulator alike. A stream is a pair
// (device index, cudaStream_t as an integer).
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <utility>

#include "../tensor_caster.h"
#include "attention_sm90.h"
#include "ops.h"
#ifdef LLAMA_FAST_EMULATE
#include "../emulator/block.h"
#include "../emulator/memory.h"
#endif

namespace py = pybind11;
namespace cuda = llama_fast::cuda;
using llama_fast::Tensor;

namespace pybind11::detail {

template <>
struct type_caster<cuda::Stream> {
  PYBIND11_TYPE_CASTER(cuda::Stream, const_name("tuple[int, int]"));

  bool load(handle src, bool) {
    if (!PyTuple_Check(src.ptr()) || PyTuple_GET_SIZE(src.ptr()) != 2) return false;
    value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(src.ptr(), 0)));
    value.handle = PyLong_AsVoidPtr(PyTuple_GET_ITEM(src.ptr(), 1));
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

#ifdef LLAMA_FAST_EMULATE

// An argument as the emulator's kernels take it: a tensor's memory made known to them for the time of the call.
template <class T>
struct Known {
  T value;
  Known(const T& x, const char*, int) : value(x) {}
};
template <>
struct Known<Tensor> {
  Tensor value;
  llama_fast::emulator::Mapping mapping;
  Known(const Tensor& x, const char* op, int index) : value(x) {
    if (x.data == nullptr) return;
    int64_t elements = 1;
    for (int i = 0; i < x.ndim; ++i)
      elements = x.size[i] == 0 || elements == 0 ? 0 : elements + (x.size[i] - 1) * x.stride[i];
    const int64_t item = x.dtype == llama_fast::DType::i64                                         ? 8
                         : x.dtype == llama_fast::DType::bf16 || x.dtype == llama_fast::DType::f16 ? 2
                                                                                                   : 4;
    const std::string label = std::string(op) + "'s argument " + std::to_string(index);
    mapping = llama_fast::emulator::Mapping(x.data, static_cast<size_t>(elements * item), label);
    value.data = mapping.data();
  }
};

template <class... A, size_t... I>
void call(void (*f)(A...), const char* op, std::index_sequence<I...>, const std::decay_t<A>&... arguments) {
  const std::tuple<Known<std::decay_t<A>>...> known{Known<std::decay_t<A>>(arguments, op, static_cast<int>(I))...};
  f(std::get<I>(known).value...);
}

#else

template <class... A, size_t... I>
void call(void (*f)(A...), const char*, std::index_sequence<I...>, const std::decay_t<A>&... arguments) {
  f(arguments...);
}

#endif

template <class... A, class... Names>
void bind(py::module_& module, const char* op, void (*f)(A...), const Names&... names) {
  module.def(
      op, [op, f](const std::decay_t<A>&... arguments) { call(f, op, std::index_sequence_for<A...>{}, arguments...); },
      py::arg(names)..., py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

#ifdef LLAMA_FAST_EMULATE
PYBIND11_MODULE(_native_cuda_emulated, module) {
#else
PYBIND11_MODULE(_native_cuda, module) {
#endif
  module.doc() = "The CUDA ops of llama_fast. Use llama_fast's public functions: these check nothing.";
  module.attr("interface") = llama_fast::kInterface;
  bind(module, "rms_norm_fwd", &cuda::rms_norm_fwd, "x", "weight", "eps", "y", "rstd");
  bind(module, "rms_norm_bwd", &cuda::rms_norm_bwd, "dy", "x", "weight", "rstd", "dx", "dweight", "scratch");
  bind(module, "add_rms_norm_fwd", &cuda::add_rms_norm_fwd, "x", "residual", "weight", "eps", "y", "sum", "rstd");
  bind(module, "add_rms_norm_bwd", &cuda::add_rms_norm_bwd, "dy", "dsum", "sum", "weight", "rstd", "dx", "dweight",
       "scratch");
  bind(module, "swiglu_fwd", &cuda::swiglu_fwd, "gate", "up", "y");
  bind(module, "swiglu_bwd", &cuda::swiglu_bwd, "dy", "gate", "up", "dgate", "dup");
  bind(module, "rope_fwd", &cuda::rope_fwd, "q", "k", "cos", "sin", "interleaved", "q_out", "k_out");
  bind(module, "rope_bwd", &cuda::rope_bwd, "dq_out", "dk_out", "cos", "sin", "interleaved", "dq", "dk");
  bind(module, "attention_fwd", &cuda::attention_fwd, "q", "k", "v", "cu_seqlens", "scale", "causal", "window", "out",
       "lse", "scratch");
  bind(module, "attention_bwd", &cuda::attention_bwd, "dout", "q", "k", "v", "out", "lse", "cu_seqlens", "scale",
       "causal", "window", "dq", "dk", "dv", "scratch");
  bind(module, "cross_entropy_rows", &cuda::cross_entropy_rows, "logits", "targets", "row_scale", "ignore_index",
       "label_smoothing", "z_loss", "loss", "lse");
  bind(module, "cross_entropy_piece", &cuda::cross_entropy_piece, "logits", "targets", "dtarget", "lse", "row_scale",
       "first", "V", "ignore_index", "label_smoothing", "z_loss");
#ifdef LLAMA_FAST_SM90
  bind(module, "attention_sm90_fwd", &cuda::attention_sm90_fwd, "q", "k", "v", "cu_seqlens", "scale", "causal",
       "window", "out", "lse", "scratch");
  bind(module, "attention_sm90_bwd", &cuda::attention_sm90_bwd, "dout", "q", "k", "v", "out", "lse", "cu_seqlens",
       "scale", "causal", "window", "dq", "dk", "dv", "scratch");
  module.def("attention_sm90_bwd_scratch", &cuda::attention_sm90_bwd_scratch, py::arg("q"), py::arg("cu_seqlens"));
#endif
  module.def("attention_fwd_scratch", &cuda::attention_fwd_scratch);
  module.def("attention_bwd_scratch", &cuda::attention_bwd_scratch, py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("cu_seqlens"), py::arg("scale"), py::arg("device"));
  module.def("norm_scratch", &cuda::norm_scratch, py::arg("R"), py::arg("C"), py::arg("item"), py::arg("device"));
#ifdef LLAMA_FAST_EMULATE
  module.attr("architectures") = "";
  module.def(
      "set_options",
      [](uint64_t seed, bool race_check, int workers) {
        llama_fast::emulator::options() = {seed, race_check, workers};
      },
      py::arg("seed") = 0, py::arg("race_check") = true, py::arg("workers") = 2);
  module.def("set_architecture", &cuda::set_architecture, py::arg("value"));
  module.def("set_multiprocessors", &cuda::set_multiprocessors, py::arg("value"));
  module.def("counters", [] {
    const llama_fast::emulator::Counters c = llama_fast::emulator::counters();
    py::dict counts;
    counts["mma"] = c.mma;
    counts["wgmma"] = c.wgmma;
    counts["ldmatrix"] = c.ldmatrix;
    counts["bank_conflicts"] = c.bank_conflicts;
    return counts;
  });
#else
  module.attr("architectures") = LLAMA_FAST_CUDA_ARCHITECTURES;
  module.def("set_synchronous", &cuda::set_synchronous, py::arg("value"));
#endif
}
