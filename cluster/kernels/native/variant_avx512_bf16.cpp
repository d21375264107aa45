// The kernels for x86-64 with avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512bf16.
#if defined(__x86_64__)
#define MOE_VARIANT avx512_bf16
#define MOE_LANES 16
#define MOE_X86
#define MOE_DPBF16
#define MOE_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#include "all.inc"
#endif
