#include "../multi_tensor/apply_cuda.cuh"
#include "../update_rules/adam.h"

namespace fusedopt {

template PreparedUpdate prepare_cuda(const Adam&, double, const StoredAs&, bool);

}  // namespace fusedopt
