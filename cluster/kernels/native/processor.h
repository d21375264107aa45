// The vectors that this processor has and the system keeps for a thread, and those that the compiler knows. By cpuid: the
// compilers' own function does not know every name, nor each compiler the same ones.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

// GCC 10, Clang 9: an older one builds the library without this variant.
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#define MOE_HAS_AVX512_BF16
#endif

// GCC 11, Clang 12; Linux lends the tiles to a process that asks for them.
#if defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define MOE_HAS_AMX_BF16
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe {

struct Processor {
    bool avx2, avx512, avx512_bf16, amx_bf16;
};

inline Processor processor() {
    unsigned a, b, c, d, features = 0, vectors = 0, tiles = 0, more = 0, kept = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) features = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) vectors = b, tiles = d;
    if (vectors && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) more = a;
    const auto has = [](unsigned word, int bit) { return (word >> bit & 1) != 0; };
    if (has(features, 27)) __asm__("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));  // what the system keeps: XCR0
    Processor found;
    found.avx2 = (kept & 0x06) == 0x06 && has(features, 12) && has(features, 29) && has(vectors, 5);  // fma, f16c, avx2
    found.avx512 = found.avx2 && (kept & 0xe6) == 0xe6 && has(vectors, 16) && has(vectors, 17) && has(vectors, 30) &&
                   has(vectors, 31);  // f, dq, bw, vl
    found.avx512_bf16 = found.avx512 && has(more, 5);
    found.amx_bf16 = found.avx512_bf16 && (kept & 0x60000) == 0x60000 && has(tiles, 22) && has(tiles, 24);
    return found;
}

#if defined(MOE_HAS_AMX_BF16)
// Whether this process may use tiles, from now on. A thread's signal stack must be large enough for them, else not.
inline bool has_tiles() {
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return processor().amx_bf16 && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}
#endif

}  // namespace moe
#endif
