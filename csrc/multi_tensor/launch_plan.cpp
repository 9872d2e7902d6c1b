#include "launch_plan.h"

namespace fusedopt {

void LaunchPlan::clear() {
  numel_.clear();
  first_unit_.assign(1, 0);
  num_elements_ = 0;
}

void LaunchPlan::add(std::int64_t numel) {
  numel_.push_back(numel);
  first_unit_.push_back(first_unit_.back() + (numel + kPieceElements - 1) / kPieceElements);
  num_elements_ += numel;
}

std::int64_t LaunchPlan::num_chunks() const {
  constexpr std::int64_t kUnits = kChunkElements / kPieceElements;
  return (first_unit_.back() + kUnits - 1) / kUnits;
}

std::size_t LaunchPlan::tensor_at(std::int64_t unit) const {
  const auto after = std::upper_bound(first_unit_.begin(), first_unit_.end(), unit);
  return static_cast<std::size_t>(after - first_unit_.begin()) - 1;
}

}  // namespace fusedopt
