#include "kernel_table.h"
#include "vector_portable.h"

namespace action_kernels {

const KernelTable portable_kernels = kernel_table<Portable>("portable");

}  // namespace action_kernels
