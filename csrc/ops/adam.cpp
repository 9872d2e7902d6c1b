#include "../update_rules/adam.h"

#include "../multi_tensor/apply_cpu.h"

namespace fusedopt {

template PreparedUpdate prepare_cpu<Isa::FUSEDOPT_ISA>(const Adam&, double, const StoredAs&);

}  // namespace fusedopt
