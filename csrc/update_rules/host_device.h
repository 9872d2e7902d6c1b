#pragma once

// Marks the functions that the CPU compilers and NVRTC both compile. They are always inlined on the
// CPU: a copy that the linker could share between instruction-set levels must not exist.
#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif
