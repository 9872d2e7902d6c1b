#include "../update_rules/rmsprop.h"

#include "../multi_tensor/apply_cpu.h"

namespace fusedopt {

template PreparedUpdate prepare_cpu<Isa::FUSEDOPT_ISA>(const RMSprop&, double, const StoredAs&);

}  // namespace fusedopt
