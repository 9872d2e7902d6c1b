#include "registry.h"

#include <stdexcept>

#include "../update_rules/adagrad.h"
#include "../update_rules/adam.h"
#include "../update_rules/rmsprop.h"
#include "../update_rules/sgd.h"

namespace fusedopt {

namespace {

template <typename Rule>
class GroupRuleOf : public GroupRule {
 public:
  explicit GroupRuleOf(const OptionReader& options) : rule_(Rule::from(options)) {}
  unsigned state_mask() const override { return rule_.state_mask(); }
  bool is_defined(double step, double largest) const override {
    return rule_.is_defined(step, largest);
  }
  PreparedUpdate prepare(double step, const StoredAs& stored, Where where) const override {
    return fusedopt::prepare(rule_, step, stored, where);
  }

 private:
  Rule rule_;
};

template <typename Rule>
RuleEntry entry(const char* name) {
  return {name, Rule::kHasStep, [](const OptionReader& options) -> std::unique_ptr<GroupRule> {
            return std::make_unique<GroupRuleOf<Rule>>(options);
          }};
}

const RuleEntry kRules[] = {
    entry<Adam>("adam"),
    entry<Adagrad>("adagrad"),
    entry<RMSprop>("rmsprop"),
    entry<SGD>("sgd"),
};

}  // namespace

const RuleEntry& find_rule(const std::string& name) {
  for (const RuleEntry& rule : kRules) {
    if (name == rule.name) return rule;
  }
  throw std::invalid_argument("no rule '" + name + "'");
}

}  // namespace fusedopt
