#include "group_reader.h"

#include <unordered_map>

#include "options.h"

namespace fusedopt {

void GroupReader::add(const py::dict& storage) {
  storage_.emplace_back();
  read_.emplace_back();
  for (const auto& [name, value] : storage) {
    storage_.back().emplace_back(py::reinterpret_borrow<py::object>(name),
                                 py::reinterpret_borrow<py::object>(value));
  }
}

// All that was read is in the same dict, and cannot change there.
bool GroupReader::is_unchanged(PyObject* dict, const Read& read) {
  const std::uint64_t version = version_of(dict);
  if (version != 0) return version == read.version;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  std::size_t at = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (at + 2 > read.entries.size()) return false;
    if (key != read.entries[at].ptr() || value != read.entries[at + 1].ptr()) return false;
    at += 2;
  }
  return at == read.entries.size() && at != 0;
}

bool GroupReader::have_same_params(const py::list& groups, const Recogniser& recogniser,
                                   const std::vector<GroupRecord>& records) const {
  if (groups.size() != records.size()) return false;
  std::size_t e = 0;
  for (std::size_t g = 0; g < records.size(); ++g) {
    PyObject* const dict = PyList_GET_ITEM(groups.ptr(), g);
    if (!PyDict_CheckExact(dict) || !is_unchanged(dict, read_[g])) return false;
    PyObject* const params = read_[g].params;
    if (static_cast<std::size_t>(PyList_GET_SIZE(params)) != records[g].num_params) return false;
    for (std::size_t i = 0; i < records[g].num_params; ++i, ++e) {
      if (PyList_GET_ITEM(params, i) != recogniser.param(e)) return false;
    }
  }
  return true;
}

bool GroupReader::read(const py::list& groups, const RuleEntry& rule, const std::string& owner,
                       std::vector<GroupRecord>* records) {
  bool has_changed = false;
  for (std::size_t g = 0; g < records->size(); ++g) {
    if (groups.size() <= g) return false;
    PyObject* const dict = PyList_GET_ITEM(groups.ptr(), g);
    if (!PyDict_CheckExact(dict)) return false;
    if (read_[g].is_constant && is_unchanged(dict, read_[g])) continue;
    has_changed = true;
    // A number can be an object that runs code when it is read.
    const auto held = py::reinterpret_borrow<py::object>(dict);
    read_[g] = Read();
    if (!read_group(dict, rule, owner, g, &(*records)[g])) return false;
  }
  if (has_changed) find_likes(records);
  return true;
}

bool GroupReader::read_group(PyObject* dict, const RuleEntry& rule, const std::string& owner,
                             std::size_t g, GroupRecord* record) {
  Read read;
  read.version = version_of(dict);
  read.params = item_of(dict, interned("params"));
  if (read.params == nullptr || !PyList_CheckExact(read.params)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (read.version == 0 && PyDict_Next(dict, &position, &key, &value)) {
    read.entries.push_back(py::reinterpret_borrow<py::object>(key));
    read.entries.push_back(py::reinterpret_borrow<py::object>(value));
  }
  bool has_constants = true;
  const Options options(dict, owner, g, rule.has_step);
  const bool python = options.flag("differentiable", false);
  if (python != record->python || options.capturable() != record->capturable) return false;
  if (!python) {  // else the Python rule reads its options itself
    record->rule = rule.read(options);
    record->options_device = options.device();
    for (const auto& [name, expected] : storage_[g]) {
      PyObject* const found = item_of(dict, name.ptr());
      const auto now = py::reinterpret_borrow<py::object>(found == nullptr ? Py_None : found);
      if (expected.is(now)) continue;
      if (!expected.equal(now)) return false;
      has_constants = has_constants && is_constant(now.ptr());
    }
    record->ema_weight = static_cast<float>(1 - options.get("ema", 1));
    const int mask = static_cast<int>(record->rule->state_mask());
    if (record->state_mask >= 0 && mask != record->state_mask) return false;
    record->state_mask = mask;
  }
  read.is_constant = has_constants && options.is_constant();
  read.options = options.read();
  read_[g] = std::move(read);
  return true;
}

void GroupReader::find_likes(std::vector<GroupRecord>* records) const {
  std::unordered_map<std::string, std::uint32_t> first;
  for (std::size_t g = 0; g < records->size(); ++g) {
    const auto number = static_cast<std::uint32_t>(g);
    (*records)[g].like = first.emplace(read_[g].options, number).first->second;
  }
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (const auto& options : storage_) {
    for (const auto& [name, value] : options) {
      Py_VISIT(name.ptr());
      Py_VISIT(value.ptr());
    }
  }
  for (const Read& read : read_) {
    for (const py::object& entry : read.entries) Py_VISIT(entry.ptr());
  }
  return 0;
}

}  // namespace fusedopt
