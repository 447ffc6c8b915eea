// Every function that one C file offers to another or to Python, and the structures that they are given.
//
// All C files include this, so the compiler holds definitions to it; native.py reads it, so Python calls what is here. For
// both: one declaration after another, no macros, `int`, `int32_t`, `int64_t`, `float`, pointers and the structures above.
// M tokens, N outputs, K inputs, all contiguous unless a stride is given. Functions that give an int give 0, or 1 where they
// had no memory, unless said.
#pragma once
#include <stdint.h>

int bitnet_best_isa(void);  // `enum isa` of common.h

// matmul.c: 64 bits for each value, because the caller packs them as one block.
typedef struct {
    const int8_t *x;
    int64_t x_stride, m, k;
    const uint8_t *w;
    int64_t row_bytes, n, planes;
    const int32_t *known_sum;  // sums of the tokens (M), or null
    const float *x_inv;  // (M), or null: then out is int32
    const float *w_inv;  // (N), or one value where w_inv_stride is 0
    int64_t w_inv_stride;
    void *out;  // (M, N)
    int64_t threads, isa;
} packed_matmul_call;

int bitnet_packed_matmul(const packed_matmul_call *c);
// The share of one thread that is already running. Writes its rows of out only; `sum` as known_sum above.
int bitnet_matmul_share(
    const int8_t *x, int64_t m, int64_t k, const uint8_t *w, int64_t row_bytes, int64_t n, int planes, const int32_t *sum,
    const float *x_inv, const float *w_inv, int64_t w_inv_stride, float *out, int part, int parts, int isa);

// grouped.c: scale (N, groups).
int bitnet_packed_matmul_grouped(
    const int8_t *x, int64_t x_stride, int64_t m, int64_t k, const uint8_t *w, int64_t row_bytes, int64_t n, int planes,
    const float *scale, int64_t group_size, const float *x_inv, float *out, int threads, int isa);

// affine.c: scale and zero (N, groups); table (2^bits) or null; x float32 or int8, with x_inv (M) or null.
int bitnet_affine_matmul(
    const void *x, int is_float, int64_t x_stride, int64_t m, int64_t k, const uint8_t *w, int64_t row_bytes, int64_t n,
    int bits, const float *scale, const float *zero, const float *table, int64_t group_size, const float *x_inv,
    float *out, int threads, int isa);

// wide.c: w int8 with scale (N), or float16. Gives 1 where this machine has no fast way; then nothing was written.
int bitnet_wide_matmul(
    const float *x, int64_t m, int64_t k, const void *w, int64_t n, int is_int8, const float *scale, float *y,
    int threads, int isa);

// norm.c: weight (K) or null for no norm; mean_square (M) from torch, or null to compute it with `lanes`.
int bitnet_norm_quantize(
    const float *x, int64_t x_stride, int64_t m, int64_t k, const float *weight, const float *mean_square, float eps,
    int lanes, int8_t *q, float *inv_scale, int32_t *row_sum, int threads, int isa);
// RMSNorm alone, (M, K) -> (M, K); in place where y is x.
void bitnet_norm(const float *x, int64_t m, int64_t k, const float *weight, float eps, int lanes, float *y);
// The same, and rstd (M) for the backward.
void bitnet_norm_forward(
    const float *x, int64_t m, int64_t k, const float *weight, float eps, int lanes, float *y, float *rstd, int threads,
    int isa);
// grad (M, K) of the output -> grad_x (M, K), grad_weight (threads, K): one part for each thread, zero before.
void bitnet_norm_backward(
    const float *grad, const float *x, const float *weight, const float *rstd, int64_t m, int64_t k, float *grad_x,
    float *grad_weight, int threads, int isa);
// The mean of squares alone, for finding out which order torch adds in.
float bitnet_mean_of_squares(const float *x, int64_t k, int lanes);

// attention.c: one token of each sequence.
typedef struct {
    const float *q;  // (M, H, K)
    int64_t q_stride, m, heads, kv_heads, head_dim;
    const float *keys, *values;  // token 0 of sequence 0, head 0
    int64_t sequence_stride, head_stride, token_stride;
    const int64_t *first;  // (M): the first token that each sequence sees, or null for token 0
    int64_t tokens;
    float *out;  // (M, H * K)
} attention_args;

int bitnet_attend(const attention_args *a, int threads, int isa);
// Heads `from` to `to`, counted over all sequences; `p` has room for the scores of a head.
void bitnet_attend_heads(const attention_args *a, int64_t from, int64_t to, float *p, int isa);

// decode.c: the matrices that read one tensor, joined, and the norm before them.
typedef struct {
    const float *norm;  // (K) or null
    const uint8_t *w;
    const float *w_inv;  // (N), or one value where w_inv_stride is 0
    int64_t w_inv_stride, row_bytes, n, k, planes;
    float eps;
} readers;

typedef struct { readers qkv, wo, gate_up, w2; } block;

typedef struct {
    const block *blocks;
    int64_t layers, heads, kv_heads, head_dim;
    const float *last_norm;  // (D), after the last block
    float last_eps;
    int silu;  // else relu2
    int sum_lanes, exp_lanes;
} decoder;

typedef struct {
    float *keys, *values;  // token 0 of layer 0, sequence 0, head 0
    int64_t layer_stride, sequence_stride, head_stride, token_stride, length;
    const int64_t *first;  // (M): first token that a sequence sees, or null
} cache;

// x (M, D), at most 16 tokens: embedded tokens in, the output of the last norm out. cos, sin: (M, K), or (K) where
// angle_stride is 0. Keys and values of the tokens are written to the cache at `length`.
int bitnet_decode(
    const decoder *d, const cache *c, float *x, int64_t m, const float *cos, const float *sin, int64_t angle_stride,
    int threads, int isa);
// gate_up (M, 2 F) -> h (M, F) = activation(gate) * up, as torch computes it: silu by vectors of `lanes`; or relu2.
void bitnet_activate(const float *gate_up, int64_t m, int64_t f, int silu, int lanes, float *h, int isa);

// weights.c: out (4): counts of 2^-14 and 2^-40 for sum |w|, then for sum w. Gives 1 where a weight is too large or no number.
int bitnet_weight_sums(const float *w, int64_t count, int with_sign, double *out, int threads, int isa);
void bitnet_weight_levels(
    const float *w, int64_t count, float inv_scale, float mean, int binary, int8_t *q, int threads, int isa);
// Levels (N, K) -> packed (N, whole blocks).
void bitnet_pack_levels(const int8_t *q, int64_t n, int64_t k, int planes, uint8_t *out, int threads, int isa);

// gradients.c: g (M, N), each row divided by row_inv (M) if given. A scale for each row, or for each column: inv_scale
// (M) or (N). high and low (M, N); low is not touched for one digit.
int bitnet_gradient_digits(
    const float *g, const float *row_inv, int64_t m, int64_t n, int per_column, int digits, int8_t *high, int8_t *low,
    float *inv_scale, int threads, int isa);
// (256 high + low) / (row_inv[i] * scale): int32 (M, N), low or null, to float32 (M, N).
void bitnet_join_digits(
    const int32_t *high, const int32_t *low, int64_t m, int64_t n, const float *row_inv, float scale, float *out,
    int threads);
