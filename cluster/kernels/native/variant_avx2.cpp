// The kernels for x86-64 with avx2, fma, f16c.
#if defined(__x86_64__)
#define MOE_VARIANT avx2
#define MOE_LANES 8
#define MOE_X86
#define MOE_TARGET "avx2,fma,f16c"
#include "all.inc"
#endif
