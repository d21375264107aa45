// The kernels for any processor: vectors of 4, which SSE2 and NEON have.
#define MOE_VARIANT plain
#define MOE_LANES 4
#include "all.inc"
