// The products for x86-64 with amx-tile and amx-bf16; its other kernels are those of avx512_bf16.
#include "processor.h"

#if defined(MOE_HAS_AMX_BF16)
#define MOE_VARIANT amx_bf16
#define MOE_LANES 16
#define MOE_X86
#define MOE_DPBF16
#define MOE_TILES
#define MOE_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"
#include "all.inc"
#endif
