// The kernels, and one table of them for each kind of processor. A kernel is a function of pointers, shapes and strides.
// M: rows, N: outputs, K: inputs.
#pragma once

#include <stdint.h>

namespace moe {

// The last two are of a cache alone: whole numbers of 8 bits, or e4m3, in rows that end with a scale (cache_rows.py).
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kCacheInt8 = 3, kCacheFloat8 = 4 };

// Rows of weights in 8 and 4 bits: quantized_rows.inc.
enum Form : int32_t { kInt4 = 4, kInt8 = 8, kNf4 = 5, kInt8Groups = 9 };

// How a row's token is chosen: cluster/kernels/sampling/rule.py, which sampling/native.py packs. temperature 0 is greedy,
// top_k 0 keeps all, num_top -1 wants no log-probabilities. first_change: of num_changes ids and counts.
// mask: the number of the row's mask, -1 for none.
struct SamplingRule {
    double temperature, top_p, max_distance;
    float repetition, presence, frequency;
    int32_t num_top;
    int64_t top_k;
    uint64_t seed;
    int64_t position, first_change, num_changes;
    int64_t mask;
};

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

    // Causal attention over a paged cache for the sequences of 1 to most_queries new tokens; it leaves the rows of
    // others alone. q, out: [rows, Q, D] of dtype. k, v: [blocks, S, KV, ..] of `stored`, dtype or one in 8 bits, with
    // strides of a block, a token and a head.
    // tables: [B, blocks of the longest]. query_lens, context_lens: [B], new tokens, and all up to the last of them.
    // window: tokens that one sees, itself among them, 0 for all. scratch: attention_scratch(stored, ..) bytes.
    void (*attention)(int32_t dtype, int32_t stored, const void* q, int64_t q_stride, const void* k, const void* v,
                      int64_t block_stride, int64_t token_stride, int64_t head_stride, const int64_t* tables,
                      int64_t table_stride, const int64_t* query_lens, const int64_t* context_lens, int64_t B,
                      int64_t most_queries, int64_t Q, int64_t KV, int64_t D, int64_t S, float scale, int64_t window,
                      void* out, int64_t out_stride, void* scratch, int32_t threads);
    int64_t (*attention_scratch)(int32_t stored, const int64_t* query_lens, const int64_t* context_lens, int64_t B,
                                 int64_t most_queries, int64_t Q, int64_t D, int32_t threads);

    // out[t] = sum over a row's experts of weights[t, s] * (silu(x · gate) * (x · up)) · down, in float32, in the order of
    // their ids. x [T, H] of dtype; ids, weights [T, S], an id outside 0 … L - 1 has no expert here; gate_up [L]: matrices
    // [2I, H], gate above up; down [L]: [H, I]; out [T, H]. scratch: experts_scratch(dtype, T, S, L, H, I) bytes.
    void (*experts)(int32_t dtype, const void* x, int64_t x_stride, const int64_t* ids, const float* weights, int64_t T,
                    int64_t S, const void* const* gate_up, const void* const* down, int64_t L, int64_t H, int64_t I,
                    float* out, void* scratch, int32_t threads);
    int64_t (*experts_scratch)(int32_t dtype, int64_t T, int64_t S, int64_t L, int64_t H, int64_t I);

    // A token for each of B rows of V logits (2^31 at most), -1 where the largest is not finite, -2 where every finite
    // one is banned. Where a rule wants them, the token's log-probability and the likeliest tokens', best first.
    // ids, counts: of all rows, a token and how often it is in the output, -1 for one that is banned.
    // masks: of mask_words each, a bit for each of V tokens, the lowest first; a token without one counts as if its logit
    // were -inf, in log-probabilities too.
    // top_ids, top_logprobs: [B, top_stride], each row has room for its num_top or V. most_changes: of a row.
    // scratch: choose_tokens_scratch(V, most_changes) bytes for each thread.
    void (*choose_tokens)(int32_t dtype, const void* logits, int64_t stride, int64_t B, int64_t V,
                          const SamplingRule* rules, const int32_t* ids, const int32_t* counts, const uint32_t* masks,
                          int64_t mask_words, int64_t* tokens, float* logprobs, int64_t top_stride, int32_t* top_ids,
                          float* top_logprobs, int64_t most_changes, void* scratch, int32_t threads);
    int64_t (*choose_tokens_scratch)(int64_t V, int64_t most_changes);
    // The numbers in [0, 1) with which rows of these seeds and positions are drawn, [B] each.
    void (*uniform_numbers)(const int64_t* seeds, const int64_t* positions, double* numbers, int64_t B);

    // As `linear`, of a weight in a Form: N rows of w_stride bytes each; x, bias and out are of dtype.
    // scratch: quantized_scratch(dtype, form, M, K) bytes.
    void (*linear_quantized)(int32_t dtype, int32_t form, const void* x, int64_t x_stride, const void* w,
                             int64_t w_stride, const void* bias, void* out, int64_t out_stride, int64_t M, int64_t N,
                             int64_t K, void* scratch, int32_t threads);
    int64_t (*quantized_scratch)(int32_t dtype, int32_t form, int64_t M, int64_t K);

    // Softmax over a row's E logits in float32, then the S largest, of equal ones the first; normalize: their weights add
    // up to 1. logits: [T, E] of dtype; ids, weights: [T, S]. scratch: [threads, E] float32.
    void (*route)(int32_t dtype, const void* logits, int64_t T, int64_t E, int64_t S, int32_t normalize, int64_t* ids,
                  float* weights, float* scratch, int32_t threads);

    // As `experts`, of weights in a Form with rows of up_stride and down_stride bytes. scratch:
    // experts_quantized_scratch(dtype, form, T, S, L, H, I) bytes.
    void (*experts_quantized)(int32_t dtype, int32_t form, const void* x, int64_t x_stride, const int64_t* ids,
                              const float* weights, int64_t T, int64_t S, const void* const* gate_up,
                              int64_t up_stride, const void* const* down, int64_t down_stride, int64_t L, int64_t H,
                              int64_t I, float* out, void* scratch, int32_t threads);
    int64_t (*experts_quantized_scratch)(int32_t dtype, int32_t form, int64_t T, int64_t S, int64_t L, int64_t H,
                                         int64_t I);

    // Rounds a matrix of dtype to rows of 8 bits, or of 4 with groups of 32 << shift and zeros where has_zeros is 1.
    void (*quantize)(int32_t dtype, const void* w, int64_t w_stride, int32_t bits, int32_t shift, int32_t has_zeros,
                     uint8_t* rows, int64_t row_bytes, int64_t N, int64_t K, int32_t threads);

    // Root mean square norm of T rows of H: out = weight * (x / sqrt(mean of x^2 + eps)), in float32, the quotient and
    // the result rounded to the dtype. Where delta is not null, sum_out = x + delta is normed. sum_out, out: [T, H].
    void (*rms_norm)(int32_t dtype, const void* x, int64_t x_stride, const void* delta, int64_t delta_stride,
                     const void* weight, void* sum_out, void* out, int64_t T, int64_t H, float eps, int32_t threads);

    // Rotates queries and keys by halves and writes keys and values into a cache. qkv: T rows of Q query heads, rotated
    // in place, KV of keys and KV of values. cos, sin: [T, D]. k, v: [slots, KV, ..] of `stored`, dtype or one in 8
    // bits, with strides of a slot and a head; in 8 bits the keys of qkv are written over.
    void (*rotate_to_cache)(int32_t dtype, int32_t stored, void* qkv, int64_t qkv_stride, const void* cos,
                            const void* sin, const int64_t* slots, void* k, void* v, int64_t token_stride,
                            int64_t head_stride, int64_t T, int64_t Q, int64_t KV, int64_t D, int32_t threads);

    // Rounds a matrix of dtype, K a multiple of 64, to levels of nf4. weights: of the first row, its chunks; row_bytes to
    // the next one's. sizes: [N, K / 64], each block's largest magnitude, NaN where it is not finite.
    void (*quantize_nf4)(int32_t dtype, const void* w, int64_t w_stride, uint8_t* weights, int64_t row_bytes,
                         float* sizes, int64_t N, int64_t K, int32_t threads);
};

// What is computed in tiles where a processor has them.
struct TileKernels {
    const char* name;
    decltype(Kernels::linear) linear;
    decltype(Kernels::experts) experts;
    decltype(Kernels::experts_scratch) experts_scratch;
};

}  // namespace moe
