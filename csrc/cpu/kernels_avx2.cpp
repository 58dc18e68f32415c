#if defined(__x86_64__)

#include "kernel_table.h"
#include "vector_avx2.h"

namespace action_kernels {

const KernelTable avx2_kernels = kernel_table<Avx2>("avx2");

}  // namespace action_kernels

#endif
