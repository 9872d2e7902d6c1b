#pragma once

#include <memory>
#include <string>

#include "group_rule.h"
#include "option_reader.h"

namespace fusedopt {

struct RuleEntry {
  const char* name;
  bool has_step;
  std::unique_ptr<GroupRule> (*read)(const OptionReader&);
};

// Throws std::invalid_argument if there is none of this name.
const RuleEntry& find_rule(const std::string& name);

}  // namespace fusedopt
