// calora_ext._native: what is not a tensor operator. Linked against libcalora.so, which holds the state.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "introspection.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU features, rungs, build facts and layout constants of the native library";
  m.def("isa", &calora::isa_name, "Name of the rung in use.");
  m.def("set_isa", [](const std::string& isa) {
    if (!calora::set_isa(isa.c_str())) throw py::value_error("rung '" + isa + "' is unknown or not runnable on this processor");
  }, py::arg("isa"), "Use another rung from now on (tests and benchmarks).");
  m.def("available", [] {
    const char* names[8];
    const int n = calora::isa_available(names, 8);
    return std::vector<std::string>(names, names + n);
  }, "Rungs this processor can run, slowest first.");
  m.def("cpu_features", [] {
    const char* names[16];
    const int n = calora::cpu_features(names, 16);
    return std::vector<std::string>(names, names + n);
  }, "Instruction sets of this processor that kernels know about.");
  m.def("build_info", &calora::build_info, "Compiler, date-free description of the build.");
  m.def("cuda_architectures", &calora::cuda_architectures, "What the CUDA kernels were compiled for; empty without them.");
  m.def("fused_rows", &calora::fused_rows, py::arg("architecture"), py::arg("format"),
        "Up to how many rows of x in bf16 or fp16 a GPU multiplies with the packed weight itself; architecture: 10 x compute capability.");
  m.def("layout_constants", [] {
    py::dict d;
    for (int i = 0; i < calora::kLayoutConstants; ++i) d[calora::layout_constant_name(i)] = calora::layout_constant(i);
    return d;
  }, "The constants of csrc/layouts.h.");
  m.def("packed_bytes", [](int format, int64_t in_features, int64_t out_features, int64_t group_size) {
    int64_t packed = 0, zeros = 0, offsets = 0, scales = 0;
    calora::packed_bytes(format, in_features, out_features, group_size, &packed, &zeros, &offsets, &scales);
    return py::make_tuple(packed, zeros, offsets, scales);
  }, py::arg("format"), py::arg("in_features"), py::arg("out_features"), py::arg("group_size"),
     "(bytes of the packed tensor, of zero points, of offsets, of scales) by csrc/layouts.h.");
}
