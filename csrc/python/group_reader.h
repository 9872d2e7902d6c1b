#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../plan/record.h"
#include "../rules/registry.h"
#include "recogniser.h"

namespace fusedopt {

// Reads the param groups of a step.
class GroupReader {
 public:
  // `storage`: the options of the next group that decide how values are stored, by name.
  void add(const py::dict& storage);

  // Reads the options of the groups that have changed. False if they are not those of the records.
  // `owner` is for messages.
  bool read(const py::list& groups, const RuleEntry& rule, const std::string& owner,
            std::vector<GroupRecord>* records);
  // Whether they have the same parameters as then. Runs no code of Python's, as what reads options may.
  bool have_same_params(const py::list& groups, const Recogniser& recogniser,
                        const std::vector<GroupRecord>& records) const;

  int traverse(visitproc visit, void* arg) const;

 private:
  // A group as it was read.
  struct Read {
    bool is_constant = false;
    std::uint64_t version = 0;        // of the dict, or where dicts have none
    std::vector<py::object> entries;  // its names and values
    std::string options;              // Options::read()
    PyObject* params = nullptr;       // the list, while the dict is unchanged
  };

  static bool is_unchanged(PyObject* dict, const Read& read);
  bool read_group(PyObject* dict, const RuleEntry& rule, const std::string& owner, std::size_t g,
                  GroupRecord* record);
  void find_likes(std::vector<GroupRecord>* records) const;

  std::vector<std::vector<std::pair<py::object, py::object>>> storage_;  // by group
  std::vector<Read> read_;                                               // by group
};

}  // namespace fusedopt
