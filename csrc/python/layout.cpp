// What Python, which has the samples, asks of torch_layout: see fusedopt/torch_layout.py.

#include <new>
#include <string>
#include <utility>

#include "../torch_layout.h"
#include "module.h"
#include "torch.h"

namespace fusedopt {
namespace {

// Samples: (tensor, address of its TensorImpl, of its StorageImpl, of its memory, bytes, negative,
// version). Gradients: (leaf, its gradient, leaf without, no leaf), by the addresses of TensorImpls.
void learn_layout_from(const py::list& samples, const py::list& gradients) {
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
                     tuple[5].cast<bool>(), tuple[6].cast<std::uint32_t>()});
  }
  torch.layout = learn_layout(known);
  std::vector<GradientSample> leaves;
  for (const py::handle sample : gradients) {
    const auto tuple = py::cast<py::tuple>(sample);
    leaves.push_back({pointer(tuple[0]), pointer(tuple[1]), pointer(tuple[2]), pointer(tuple[3])});
  }
  learn_gradients(leaves, &torch.layout);
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

// The gradient of a leaf as it is found without asking, and how many own it; None if it is not.
py::object read_gradient(const py::object& leaf) {
  PyObject* const grad = torch.layout.knows_gradient() ? known_gradient(leaf.ptr()) : nullptr;
  if (grad == nullptr) return py::none();
  constexpr std::size_t kOwners = 8;  // behind the virtual table
  return py::make_tuple(py::reinterpret_borrow<py::object>(grad),
                        half_word_at(impl_of(grad), kOwners));
}

// Counts up the versions, without asking if that is known.
void bump_versions_of(const py::list& tensors) {
  std::vector<PyObject*> written;
  for (const py::handle tensor : tensors) written.push_back(tensor.ptr());
  bump_versions(written);
}

// Tensors of one kind, by the addresses of their TensorImpls and StorageImpls.
void learn_counts_from(const py::list& tensors, int ndim) {
  std::vector<LayoutSample> known;
  for (const py::handle sample : tensors) {
    const auto [impl, storage] = sample.cast<std::pair<std::uintptr_t, std::uintptr_t>>();
    known.push_back({});
    known.back().impl = reinterpret_cast<const char*>(impl);
    known.back().storage = reinterpret_cast<const char*>(storage);
  }
  learn_counts(known, ndim, &torch.layout);
}

// Leaves memory that has this byte everywhere to whoever asks for some next.
void fill_free_memory(int byte) {
  std::vector<void*> blocks;
  for (std::size_t size = 64; size <= 512; size += 16) {
    for (int i = 0; i < 16; ++i) {
      auto* const block = static_cast<volatile char*>(::operator new(size));
      for (std::size_t at = 0; at < size; ++at) block[at] = static_cast<char>(byte);
      blocks.push_back(const_cast<char*>(block));
    }
  }
  for (void* block : blocks) ::operator delete(block);
}

void trust_words() { torch.layout.trusts_words = torch.layout.knows_memory(); }

// The words of a tensor as they were; equal to nobody's if they are not to be trusted.
class RememberedTensor {
 public:
  explicit RememberedTensor(const py::object& tensor) {
    words_.remember(torch.layout, impl_of(tensor.ptr()), tensor.attr("dim")().cast<int>(), &kinds_);
  }
  bool is_equal(const py::object& tensor) const {
    return words_.are_those_of(impl_of(tensor.ptr()));
  }
  // By how much the memory of another tensor of this kind is further on, or None.
  py::object distance_to(const py::object& tensor) const {
    TensorWords words = words_;
    std::ptrdiff_t distance;
    if (!words.move_to(torch.layout, impl_of(tensor.ptr()), &distance)) return py::none();
    return py::int_(distance);
  }

 private:
  TensorKinds kinds_;
  TensorWords words_;
};

void forget_layout(const std::string& what) {
  if (what == "words" || what == "memory") torch.layout.trusts_words = false;
  if (what == "memory") torch.layout.num_bytes = 0;
  if (what == "negative") torch.layout.keys = 0;
  if (what == "version") torch.layout.count = 0;
  if (what == "gradient") torch.layout.grad = 0;
}

}  // namespace

void export_layout(py::module_& module) {
  module.def("learn_layout", &learn_layout_from);
  module.def("read_layout", &read_layout);
  module.def("read_gradient", &read_gradient);
  module.def("bump_versions", &bump_versions_of);
  module.def("forget_layout", &forget_layout);
  module.def("trust_words", &trust_words);
  module.def("learn_counts", &learn_counts_from);
  module.def("fill_free_memory", &fill_free_memory);
  py::class_<RememberedTensor>(module, "RememberedTensor")
      .def(py::init<const py::object&>())
      .def("is_equal", &RememberedTensor::is_equal)
      .def("distance_to", &RememberedTensor::distance_to);
}

}  // namespace fusedopt
