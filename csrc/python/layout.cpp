// What Python, which has the samples, asks of torch_layout: see fusedopt/torch_layout.py.

#include <string>

#include "../torch_layout.h"
#include "module.h"
#include "torch.h"

namespace fusedopt {
namespace {

// Samples: (tensor, address of its TensorImpl, of its StorageImpl, of its memory, bytes, negative).
void learn_layout_from(const py::list& samples) {
  std::vector<LayoutSample> known;
  const auto pointer = [](const py::handle address) {
    return reinterpret_cast<const char*>(address.cast<std::uintptr_t>());
  };
  for (const py::handle sample : samples) {
    const auto tuple = py::cast<py::tuple>(sample);
    const auto object = reinterpret_cast<const char*>(tuple[0].ptr());
    const auto object_bytes = static_cast<std::size_t>(Py_TYPE(tuple[0].ptr())->tp_basicsize);
    known.push_back({object, object_bytes, pointer(tuple[1]), pointer(tuple[2]),
                     tuple[3].cast<std::uint64_t>(), tuple[4].cast<std::uint64_t>(),
                     tuple[5].cast<bool>()});
  }
  torch.layout = learn_layout(known);
}

// ((address of the memory, bytes), negative) of a plain tensor, each None if it is not known.
py::tuple read_layout(const py::object& tensor) {
  py::object memory = py::none(), negative = py::none();
  std::uintptr_t begin;
  std::uint64_t num_bytes;
  if (torch.layout.knows_memory()) {
    storage_of(tensor.ptr(), &begin, &num_bytes);
    memory = py::make_tuple(begin, num_bytes);
  }
  if (torch.layout.knows_negative()) negative = py::bool_(has_negative_bit(tensor.ptr()));
  return py::make_tuple(memory, negative);
}

void trust_words() { torch.layout.trusts_words = torch.layout.knows_memory(); }

// The words of a tensor as they were; equal to nobody's if they are not to be trusted.
class RememberedTensor {
 public:
  explicit RememberedTensor(const py::object& tensor) {
    words_.remember(torch.layout, impl_of(tensor.ptr()), tensor.attr("dim")().cast<int>());
  }
  bool is_equal(const py::object& tensor) const {
    return words_.are_those_of(impl_of(tensor.ptr()));
  }

 private:
  TensorWords words_;
};

void forget_layout(const std::string& what) {
  if (what == "words" || what == "memory") torch.layout.trusts_words = false;
  if (what == "memory") torch.layout.num_bytes = 0;
  if (what == "negative") torch.layout.keys = 0;
}

}  // namespace

void export_layout(py::module_& module) {
  module.def("learn_layout", &learn_layout_from);
  module.def("read_layout", &read_layout);
  module.def("forget_layout", &forget_layout);
  module.def("trust_words", &trust_words);
  py::class_<RememberedTensor>(module, "RememberedTensor")
      .def(py::init<const py::object&>())
      .def("is_equal", &RememberedTensor::is_equal);
}

}  // namespace fusedopt
