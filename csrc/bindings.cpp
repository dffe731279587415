// The Python module unigendet._C. Its files of bindings (bindings*.cpp, tensors.*) are the only ones that know Python. They
// take tensors as Python objects, read their addresses and strides through their Python attributes, and check all that
// memory safety needs; nothing of torch is compiled in. What does not fit raises ValueError.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "cpu_kernels.h"
#include "tensors.h"

namespace unigendet {
namespace {

py::dict build_info() {
  py::list built, usable, archs;
  for (const CpuKernels& kernels : kCpuKernels) {
    built.append(kernels.isa);
    if (kernels.supported()) usable.append(kernels.isa);
  }
  py::dict info;
  info["compiler"] = UNIGENDET_COMPILER;
  info["isa_levels"] = built;
  info["usable_isa_levels"] = usable;
#ifdef UNIGENDET_CUDA
  const std::string names = UNIGENDET_CUDA_ARCHS;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(';', begin), names.size());
    archs.append(names.substr(begin, end - begin));
    begin = end + 1;
  }
  info["nvcc"] = UNIGENDET_NVCC;
#else
  info["nvcc"] = py::none();
#endif
  info["cuda_archs"] = archs;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels in C++ and CUDA; called by unigendet.ops.";
  module.def("build_info", build_info, "What was built: compiler, instruction sets, CUDA architectures, nvcc.");
  define_alignment_loss(module);
  define_attention(module);
  define_rows(module);
}

}  // namespace unigendet
