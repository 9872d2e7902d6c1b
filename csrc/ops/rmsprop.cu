#include "../multi_tensor/apply_cuda.cuh"
#include "../update_rules/rmsprop.h"

namespace fusedopt {

template PreparedUpdate prepare_cuda(const RMSprop&, double, const StoredAs&, bool);

}  // namespace fusedopt
