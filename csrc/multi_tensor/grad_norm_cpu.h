#pragma once

#include "apply.h"
#include "grad_norm.h"

namespace fusedopt {

// The sum of the squares of one chunk, times factor each. ops/grad_norm.cpp has the loops.
template <Isa isa>
double sum_chunk(const GradToMeasure& grad, std::int64_t begin, double factor);

}  // namespace fusedopt
