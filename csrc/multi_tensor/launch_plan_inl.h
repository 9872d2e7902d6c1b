#pragma once

#include <algorithm>

#include "tuning.h"

namespace fusedopt {

template <typename Use>
void LaunchPlan::for_each_piece(std::int64_t chunk, Use&& use) const {
  constexpr std::int64_t kUnits = kChunkElements / kPieceElements;
  std::int64_t unit = chunk * kUnits;
  const std::int64_t end = std::min(unit + kUnits, first_unit_.back());
  for (std::size_t tensor = tensor_at(unit); unit < end; ++tensor) {
    const std::int64_t begin = (unit - first_unit_[tensor]) * kPieceElements;
    const std::int64_t next_unit = std::min(end, first_unit_[tensor + 1]);
    const std::int64_t stop =
        std::min(numel_[tensor], (next_unit - first_unit_[tensor]) * kPieceElements);
    if (stop > begin) use(Piece{tensor, begin, stop - begin});
    unit = next_unit;
  }
}

}  // namespace fusedopt
