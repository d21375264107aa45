// The kernels, and one table of them for each kind of processor. A kernel is a function of pointers, shapes and strides.
// M: rows, N: outputs, K: inputs.
#pragma once

#include <stdint.h>

namespace moe {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A kernel's memory is the caller's. `threads`: at most so many, one runs on the caller. Strides count elements.
struct Kernels {
    const char* name;

    // out[m, n] = sum over k of x[m, k] * w[n, k], plus bias[n] where it is not null, summed in float32. All of dtype.
    // A row's result depends on nothing but the row. scratch: linear_scratch(dtype, M, K) bytes.
    void (*linear)(int32_t dtype, const void* x, int64_t x_stride, const void* w, int64_t w_stride, const void* bias,
                   void* out, int64_t out_stride, int64_t M, int64_t N, int64_t K, void* scratch, int32_t threads);
    int64_t (*linear_scratch)(int32_t dtype, int64_t M, int64_t K);

    // Sums all bytes of a buffer as int64, several streams at a time: how fast memory can be read.
    int64_t (*read)(const void* data, int64_t num_bytes, int32_t threads);
};

}  // namespace moe
