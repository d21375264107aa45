// The vectors that this processor has and the system keeps for a thread, and those that the compiler knows. By cpuid: the
// compilers' own function does not know every name, nor each compiler the same ones.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

// GCC 10, Clang 9: an older one builds the library without this variant.
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#define MOE_HAS_AVX512_BF16
#endif

namespace moe {

struct Processor {
    bool avx2, avx512, avx512_bf16;
};

inline Processor processor() {
    unsigned a, b, c, d, features = 0, vectors = 0, more = 0, kept = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) features = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) vectors = b;
    if (vectors && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) more = a;
    const auto has = [](unsigned word, int bit) { return (word >> bit & 1) != 0; };
    if (has(features, 27)) __asm__("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));  // what the system keeps: XCR0
    Processor found;
    found.avx2 = (kept & 0x06) == 0x06 && has(features, 12) && has(features, 29) && has(vectors, 5);  // fma, f16c, avx2
    found.avx512 = found.avx2 && (kept & 0xe6) == 0xe6 && has(vectors, 16) && has(vectors, 17) && has(vectors, 30) &&
                   has(vectors, 31);  // f, dq, bw, vl
    found.avx512_bf16 = found.avx512 && has(more, 5);
    return found;
}

}  // namespace moe
#endif
