#include "../update_rules/sgd.h"

#include "../multi_tensor/apply_cpu.h"

namespace fusedopt {

template PreparedUpdate prepare_cpu<Isa::FUSEDOPT_ISA>(const SGD&, double, const StoredAs&);

}  // namespace fusedopt
