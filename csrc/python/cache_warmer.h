#pragma once

#include <cstddef>

#include "seen.h"

namespace fusedopt {

constexpr std::size_t kBlock = 32;  // tensors looked at together

// Reads the memory that the checks of a block are about to need, so that they wait for it together:
// after a backward torch's records of the tensors are in no near cache. Prefetch instructions did
// nothing here, loads halved the time of the checks (1,000 x 64 Adam, EPYC 9005, 2026-11).
void fetch(const Seen* block, std::size_t size, Roles roles);
// The same of what torch has of tensors, some of which may be null.
void fetch_impls(const char* const* impls, std::size_t count);
// The same of what is written when their versions are bumped.
void fetch_versions(const char* const* impls, std::size_t count);

}  // namespace fusedopt
