#if defined(__aarch64__)

#include "kernel_table.h"
#include "vector_neon.h"

namespace action_kernels {

const KernelTable neon_kernels = kernel_table<Neon>("neon");

}  // namespace action_kernels

#endif
