#include "../multi_tensor/apply_cuda.cuh"
#include "../update_rules/sgd.h"

namespace fusedopt {

template PreparedUpdate prepare_cuda(const SGD&, double, const StoredAs&, bool);

}  // namespace fusedopt
