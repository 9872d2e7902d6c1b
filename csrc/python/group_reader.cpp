#include "group_reader.h"

#include "options.h"

namespace fusedopt {

void GroupReader::add(const py::dict& storage) {
  storage_.emplace_back();
  for (const auto& [name, value] : storage) {
    storage_.back().emplace_back(py::reinterpret_borrow<py::object>(name),
                                 py::reinterpret_borrow<py::object>(value));
  }
}

bool GroupReader::read(const py::list& groups, const RuleEntry& rule, const std::string& owner,
                       const Recogniser& recogniser, std::vector<GroupRecord>* records) const {
  if (groups.size() != records->size()) return false;
  std::size_t e = 0;
  for (std::size_t g = 0; g < records->size(); ++g) {
    GroupRecord& group = (*records)[g];
    PyObject* dict = PyList_GET_ITEM(groups.ptr(), g);
    PyObject* params = PyDict_CheckExact(dict) ? item_of(dict, interned("params")) : nullptr;
    if (params == nullptr || !PyList_CheckExact(params) ||
        static_cast<std::size_t>(PyList_GET_SIZE(params)) != group.num_params) {
      return false;
    }
    for (std::size_t i = 0; i < group.num_params; ++i, ++e) {
      if (PyList_GET_ITEM(params, i) != recogniser.param(e)) return false;
    }
    const Options options(dict, owner, g);
    const bool python = options.flag("differentiable", false);
    if (python != group.python || options.capturable() != group.capturable) return false;
    if (python) continue;  // the Python rule reads its options itself
    group.rule = rule.read(options);
    group.options_device = options.device();
    for (const auto& [name, value] : storage_[g]) {
      PyObject* const found = item_of(dict, name.ptr());
      const py::handle now = found == nullptr ? py::handle(Py_None) : py::handle(found);
      if (!value.is(now) && !value.equal(now)) return false;
    }
    group.ema_weight = static_cast<float>(1 - options.get("ema", 1));
    const int mask = static_cast<int>(group.rule->state_mask());
    if (group.state_mask >= 0 && mask != group.state_mask) return false;
    group.state_mask = mask;
  }
  return true;
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (const auto& options : storage_) {
    for (const auto& [name, value] : options) {
      Py_VISIT(name.ptr());
      Py_VISIT(value.ptr());
    }
  }
  return 0;
}

}  // namespace fusedopt
