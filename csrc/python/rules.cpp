#include "../rules/registry.h"
#include "module.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// What each rule keeps of a tensor, by the rule's name.
py::dict rules() {
  py::dict all;
  for (const RuleEntry& rule : all_rules()) {
    py::list slots, unsigned_slots, scalars;
    for (const Slot& slot : rule.slots) {
      slots.append(slot.name);
      if (slot.is_unsigned) unsigned_slots.append(slot.name);
    }
    for (const std::string& scalar : rule.scalars) scalars.append(scalar);
    py::dict kept;
    kept["slots"] = slots;
    kept["unsigned"] = unsigned_slots;
    kept["scalars"] = scalars;
    all[rule.name.c_str()] = kept;
  }
  return all;
}

}  // namespace

void export_rules(py::module_& module) { module.def("rules", &rules); }

}  // namespace fusedopt
