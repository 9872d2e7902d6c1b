#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../update_rules/rule.h"
#include "group_rule.h"
#include "option_reader.h"

namespace fusedopt {

// A rule, and what it keeps of each tensor: see update_rules/rule.h.
struct RuleEntry {
  std::string name;
  std::vector<Slot> slots;
  std::vector<std::string> scalars;
  bool has_step;  // there are scalars
  bool first_step_fills;
  std::unique_ptr<GroupRule> (*read)(const OptionReader&);
};

const std::vector<RuleEntry>& all_rules();

// Throws std::invalid_argument if there is none of this name.
const RuleEntry& find_rule(const std::string& name);

}  // namespace fusedopt
