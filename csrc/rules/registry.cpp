#include "registry.h"

#include <iterator>
#include <stdexcept>

#include "rule_list.h"

namespace fusedopt {

namespace {

template <typename Rule>
class GroupRuleOf final : public GroupRule {
 public:
  explicit GroupRuleOf(const OptionReader& options) : rule_(Rule::from(options)) {}
  unsigned state_mask() const override { return rule_.state_mask(); }
  Scalars advanced(const Scalars& before) const override {
    return fusedopt::advanced(rule_, before);
  }
  bool is_defined(const Scalars& scalars, double largest) const override {
    return rule_.is_defined(scalars, largest);
  }
  PreparedUpdate prepare(const Scalars& scalars, const StoredAs& stored,
                         Where where) const override {
    return fusedopt::prepare(rule_, scalars, stored, where);
  }

 private:
  Rule rule_;
};

template <typename Rule>
RuleEntry entry(const char* name) {
  static_assert(kNumSlots<Rule> <= kMaxStates);
  const auto* const scalars = Rule::kScalars.names;
  return {name,
          {std::begin(Rule::kSlots), std::end(Rule::kSlots)},
          {scalars, scalars + kNumScalars<Rule>},
          kNumScalars<Rule> != 0,
          Rule::kFirstStepFills,
          [](const OptionReader& options) -> std::unique_ptr<GroupRule> {
            return std::make_unique<GroupRuleOf<Rule>>(options);
          }};
}

}  // namespace

const std::vector<RuleEntry>& all_rules() {
#define FUSEDOPT_ENTRY(Rule, name) entry<Rule>(name),
  static const std::vector<RuleEntry> rules{FUSEDOPT_RULES(FUSEDOPT_ENTRY)};
#undef FUSEDOPT_ENTRY
  return rules;
}

const RuleEntry& find_rule(const std::string& name) {
  for (const RuleEntry& rule : all_rules()) {
    if (name == rule.name) return rule;
  }
  throw std::invalid_argument("no rule '" + name + "'");
}

}  // namespace fusedopt
