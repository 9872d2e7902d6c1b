#include "../update_rules/adagrad.h"

#include "../multi_tensor/apply_cpu.h"

namespace fusedopt {

template PreparedUpdate prepare_cpu<Isa::FUSEDOPT_ISA>(const Adagrad&, double, const StoredAs&);

}  // namespace fusedopt
