// Python's view of the CPU ops (pybind11; no math). std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace {

// A layer as Python gives it: the sixteen tensors of DecodeLayer (None for what it does not have and for caches that
// are not used), eps, interleaved, window.
llama_fast::cpu::DecodeLayer decode_layer(const py::tuple& from) {
  const auto tensor = [&](size_t i) { return from[i].cast<llama_fast::Tensor>(); };
  return {tensor(0),
          tensor(1),
          tensor(2),
          tensor(3),
          tensor(4),
          tensor(5),
          tensor(6),
          tensor(7),
          tensor(8),
          tensor(9),
          tensor(10),
          tensor(11),
          tensor(12),
          tensor(13),
          tensor(14),
          tensor(15),
          from[16].cast<double>(),
          from[17].cast<bool>(),
          from[18].cast<int64_t>()};
}

// torch.set_num_threads holds in another thread than its caller's once that thread has asked torch for the number.
struct TorchThreads {
  TorchThreads() {
    thread_local const bool asked = (py::module_::import("torch").attr("get_num_threads")(), true);
    static_cast<void>(asked);
  }
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  namespace cpu = llama_fast::cpu;
  module.doc() = "The native ops of llama_fast. Use llama_fast's public functions: these check nothing.";
  module.attr("interface") = llama_fast::kInterface;
  py::module_ m = module.def_submodule("cpu", "Kernels of csrc/cpu.");
  using unlocked = py::call_guard<TorchThreads, py::gil_scoped_release>;
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
  m.def("has_brgemm", &cpu::has_brgemm, arg("half"));
  m.def("brgemm", &cpu::brgemm, arg("a"), arg("b"), arg("out"), arg("accumulate"), unlocked());
  m.def("use_huge_pages", &cpu::use_huge_pages, arg("out"));
  m.def("transpose", &cpu::transpose, arg("x"), arg("y"), unlocked());
  m.def("argmax", &cpu::argmax, arg("x"), arg("best"), unlocked());
  using Given = const llama_fast::Tensor&;
  m.def(
      "block_before",
      [](Given x, const py::tuple& layer, Given cos, Given sin, Given q, Given k, Given v) {
        const cpu::DecodeLayer w = decode_layer(layer);
        const TorchThreads asked;
        const py::gil_scoped_release unlocked;
        cpu::block_before(x, w, cos, sin, q, k, v);
      },
      arg("x"), arg("layer"), arg("cos"), arg("sin"), arg("q"), arg("k"), arg("v"));
  m.def(
      "block_after",
      [](Given out, Given x, const py::tuple& layer, int64_t head_dim, Given y) {
        const cpu::DecodeLayer w = decode_layer(layer);
        const TorchThreads asked;
        const py::gil_scoped_release unlocked;
        cpu::block_after(out, x, w, head_dim, y);
      },
      arg("out"), arg("x"), arg("layer"), arg("head_dim"), arg("y"));
  py::class_<cpu::DecodePlan>(m, "DecodePlan")
      .def(py::init([](const llama_fast::Tensor& embed, const llama_fast::Tensor& cos, const llama_fast::Tensor& sin,
                       const py::list& layers, const llama_fast::Tensor& norm, double eps,
                       const llama_fast::Tensor& head) {
             std::vector<cpu::DecodeLayer> all;
             for (const py::handle item : layers) all.push_back(decode_layer(item.cast<py::tuple>()));
             return cpu::DecodePlan(embed, cos, sin, std::move(all), norm, eps, head);
           }),
           arg("embed"), arg("cos"), arg("sin"), arg("layers"), arg("norm"), arg("eps"), arg("head"))
      .def("step", &cpu::DecodePlan::step, arg("tokens"), arg("used"), arg("starts"), arg("logits"), unlocked());
  m.def("cross_entropy_rows", &cpu::cross_entropy_rows, arg("logits"), arg("targets"), arg("row_scale"),
        arg("ignore_index"), arg("label_smoothing"), arg("z_loss"), arg("loss"), arg("lse"), unlocked());
}
