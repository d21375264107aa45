// Which variants this binary has and this processor can run, and the library's entry points.
#include <string.h>

#include "kernels.h"
#include "parallel.h"
#include "processor.h"

namespace moe {

OpenMP openmp = {};

namespace plain { extern const Kernels table; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx512_bf16 { extern const Kernels table; }
#endif
#if defined(MOE_HAS_AMX_BF16)
namespace amx_bf16 { extern const TileKernels tile_kernels; }

namespace {

// Made here: at the start of each process nothing compiled for one kind of processor may run.
Kernels with_tiles() {
    const TileKernels& tiles = amx_bf16::tile_kernels;
    Kernels made = avx512_bf16::table;
    made.name = tiles.name;
    made.linear = tiles.linear;
    made.experts = tiles.experts;
    made.experts_scratch = tiles.experts_scratch;
    return made;
}

const Kernels* tile_table() {
    static const Kernels table = with_tiles();  // once, whichever thread comes first
    return &table;
}

}  // namespace
#endif

}  // namespace moe

extern "C" {

// Changes with a kernel's arguments: a library of another version is not used.
int moe_version() { return 4; }

// Of a variant's table: a library that was built before a kernel was added is not used either.
int moe_table_size() { return static_cast<int>(sizeof(moe::Kernels) / sizeof(void*)); }

// The variant's table, null where this processor cannot run it or the binary has none of that name.
const moe::Kernels* moe_kernels(const char* name) {
    if (!strcmp(name, "plain")) return &moe::plain::table;
#if defined(__x86_64__)
    const moe::Processor processor = moe::processor();
    if (!strcmp(name, "avx2")) return processor.avx2 ? &moe::avx2::table : nullptr;
    if (!strcmp(name, "avx512")) return processor.avx512 ? &moe::avx512::table : nullptr;
#if defined(MOE_HAS_AVX512_BF16)
    if (!strcmp(name, "avx512_bf16")) return processor.avx512_bf16 ? &moe::avx512_bf16::table : nullptr;
#endif
#if defined(MOE_HAS_AMX_BF16)
    if (!strcmp(name, "amx_bf16")) return moe::has_tiles() ? moe::tile_table() : nullptr;
#endif
#endif
    return nullptr;
}

void moe_use_openmp(void* parallel, void* barrier, void* thread, void* size) {
    moe::openmp = {reinterpret_cast<decltype(moe::OpenMP::parallel)>(parallel),
                   reinterpret_cast<decltype(moe::OpenMP::barrier)>(barrier),
                   reinterpret_cast<decltype(moe::OpenMP::thread)>(thread),
                   reinterpret_cast<decltype(moe::OpenMP::size)>(size)};
}

}  // extern "C"
