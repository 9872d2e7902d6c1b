#include "../multi_tensor/apply_cuda.cuh"
#include "../update_rules/adagrad.h"

namespace fusedopt {

template PreparedUpdate prepare_cuda(const Adagrad&, double, const StoredAs&, bool);

}  // namespace fusedopt
