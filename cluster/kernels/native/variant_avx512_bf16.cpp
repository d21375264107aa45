// The kernels for x86-64 with avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512bf16.
#include "processor.h"

#if defined(MOE_HAS_AVX512_BF16)
#define MOE_VARIANT avx512_bf16
#define MOE_LANES 16
#define MOE_X86
#define MOE_DPBF16
#define MOE_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#include "all.inc"
#endif
