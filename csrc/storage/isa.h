#pragma once

namespace fusedopt {

// Instruction-set levels: what differs between them is a template of one.
enum class Isa { baseline, avx2, avx512 };

}  // namespace fusedopt
