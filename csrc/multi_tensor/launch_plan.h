#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedopt {

// Part of one tensor: elements [begin, begin + count).
struct Piece {
  std::size_t tensor;
  std::int64_t begin, count;
};

// Divides a list of tensors into chunks of about equal work, across tensor boundaries: a chunk is
// part of one large tensor or many small ones. Every element is in exactly one piece.
class LaunchPlan {
 public:
  LaunchPlan() { clear(); }
  void clear();
  void add(std::int64_t numel);

  std::int64_t num_elements() const { return num_elements_; }
  std::int64_t num_chunks() const;

  // Calls use(piece) for the pieces of one chunk, in order.
  template <typename Use>
  void for_each_piece(std::int64_t chunk, Use&& use) const;

 private:
  std::size_t tensor_at(std::int64_t unit) const;

  std::vector<std::int64_t> numel_;
  std::vector<std::int64_t> first_unit_;  // prefix sum; a unit is kPieceElements of one tensor
  std::int64_t num_elements_;
};

}  // namespace fusedopt

#include "launch_plan_inl.h"
