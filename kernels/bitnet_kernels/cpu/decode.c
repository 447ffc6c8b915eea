// All blocks of a transformer for one new token per sequence, in one call, with the results of the operators one by one:
//
//     x += wo(quantize(sub-norm(attention(rotate(wq|wk|wv (quantize(norm x)))))))
//     x += w2(quantize(sub-norm(activation(gate) * up)))           gate|up = w1|w3 (quantize(norm x))
//
// A layer of a small model takes less time than the calls around it; here there are none.
#include "common.h"
#include "floats.h"

int bitnet_packed_matmul(
    const int8_t *, int64_t, int64_t, int64_t, const uint8_t *, int64_t, int64_t, int, const int32_t *, const float *,
    const float *, int64_t, void *, int, int);
int bitnet_norm_quantize(
    const float *, int64_t, int64_t, int64_t, const float *, const float *, float, int, int8_t *, float *, int32_t *, int,
    int);
int bitnet_attend(
    const float *, int64_t, int64_t, int64_t, int64_t, int64_t, const float *, const float *, int64_t, int64_t, int64_t,
    const int64_t *, int64_t, float *, int, int);

// The matrices that read one tensor, joined, and the norm before them. native.py mirrors these structs.
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
    int32_t silu;  // else relu2
    int32_t sum_lanes, exp_lanes, threads, isa;
} decoder;

typedef struct {
    float *keys, *values;  // token 0 of layer 0, sequence 0, head 0
    int64_t layer_stride, sequence_stride, head_stride, token_stride, length;
    const int64_t *first;  // (M): first token that a sequence sees, or null
} cache;

// Buffers of a step: quantized activations, and float32 results.
typedef struct {
    int8_t *q;
    float *inv;
    int32_t *sum;
    float *product;
} work;

// x (M, K) -> out (M, N), or out += the product.
static int multiply(const decoder *d, const readers *r, const work *b, const float *x, int64_t m, float *out, int add) {
    float *y = add ? b->product : out;
    if (bitnet_norm_quantize(x, r->k, m, r->k, r->norm, NULL, r->eps, d->sum_lanes, b->q, b->inv, b->sum, d->threads, d->isa) ||
        bitnet_packed_matmul(
            b->q, r->k, m, r->k, r->w, r->row_bytes, r->n, (int)r->planes, b->sum, b->inv, r->w_inv, r->w_inv_stride, y,
            d->threads, d->isa))
        return 1;
    if (add)
        for (int64_t i = 0; i < m * r->n; i++) out[i] += y[i];
    return 0;
}

// v (K) -> v * cos + (-second half, first half) * sin.
static void rotate(float *v, int64_t k, const float *cos, const float *sin) {
    for (int64_t i = 0; i < k / 2; i++) {
        const float first = v[i], second = v[i + k / 2];
        v[i] = first * cos[i] + -second * sin[i];
        v[i + k / 2] = second * cos[i + k / 2] + first * sin[i + k / 2];
    }
}

// gate_up (M, 2 F) -> h (M, F) = activation(gate) * up, as torch computes it on a contiguous (M, F): silu by vectors of
// `lanes`, two at a time, and by the C library for what remains at the end.
INLINE void activate(const float *gate_up, int64_t m, int64_t f, int silu, int lanes, float *h) {
    const int64_t vectors = m * f / (2 * lanes) * (2 * lanes);
    for (int64_t t = 0; t < m; t++) {
        const float *gate = gate_up + t * 2 * f, *up = gate + f;
        const int64_t whole = MIN(f, vectors - t * f > 0 ? vectors - t * f : 0);
        int64_t i = 0;
        if (!silu)
            for (; i < f; i++) {
                const float g = gate[i] < 0 ? 0 : gate[i];
                h[t * f + i] = g * g * up[i];
            }
        for (; i < whole; i++) h[t * f + i] = gate[i] / (1.0f + exp_u10(-gate[i])) * up[i];
        for (; i < f; i++) h[t * f + i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

static void activate_portable(const float *gate_up, int64_t m, int64_t f, int silu, int lanes, float *h) {
    activate(gate_up, m, f, silu, lanes, h);
}
#if defined(__x86_64__)
TARGET_AVX2 static void activate_avx2(const float *gate_up, int64_t m, int64_t f, int silu, int lanes, float *h) {
    activate(gate_up, m, f, silu, lanes, h);
}
TARGET_AVX512 static void activate_avx512(const float *gate_up, int64_t m, int64_t f, int silu, int lanes, float *h) {
    activate(gate_up, m, f, silu, lanes, h);
}
#endif

void bitnet_activate(const float *gate_up, int64_t m, int64_t f, int silu, int lanes, float *h, int isa) {
#if defined(__x86_64__)
    if (isa >= AVX512) return activate_avx512(gate_up, m, f, silu, lanes, h);
    if (isa >= AVX2) return activate_avx2(gate_up, m, f, silu, lanes, h);
#endif
    (void)isa;
    activate_portable(gate_up, m, f, silu, lanes, h);
}

// x (M, D): embedded tokens in, what the last norm reads out. cos, sin: (M, K), or (K) where angle_stride is 0. Keys and
// values of the tokens are written to the cache at `length`. Returns 0, or 1 when there is no memory.
int bitnet_decode(
    const decoder *d, const cache *c, float *x, int64_t m, const float *cos, const float *sin, int64_t angle_stride) {
    const int64_t H = d->heads, G = d->kv_heads, K = d->head_dim, D = H * K, F = d->blocks->w2.k;
    const int64_t widest = D > F ? D : F;
    const size_t floats = (size_t)m * (size_t)((H + 2 * G) * K + D + 2 * F + F + D + 1);
    char *memory = aligned_alloc(64, (floats * 4 + (size_t)(m * (4 + widest)) + 127) / 64 * 64);
    if (!memory) return 1;
    float *const qkv = (float *)memory, *const y = qkv + m * (H + 2 * G) * K, *const gate_up = y + m * D;
    float *const h = gate_up + m * 2 * F, *const product = h + m * F, *const inv = product + m * D;
    int32_t *const sum = (int32_t *)(inv + m);
    const work b = {(int8_t *)(sum + m), inv, sum, product};
    int failed = 0;
    for (int64_t layer = 0; layer < d->layers && !failed; layer++) {
        const block *w = d->blocks + layer;
        float *keys = c->keys + layer * c->layer_stride, *values = c->values + layer * c->layer_stride;
        failed = multiply(d, &w->qkv, &b, x, m, qkv, 0);
        for (int64_t t = 0; t < m; t++) {
            float *row = qkv + t * (H + 2 * G) * K;
            for (int64_t i = 0; i < H + G; i++) rotate(row + i * K, K, cos + t * angle_stride, sin + t * angle_stride);
            for (int64_t g = 0; g < G; g++) {
                const int64_t at = t * c->sequence_stride + g * c->head_stride + c->length * c->token_stride;
                memcpy(keys + at, row + (H + g) * K, (size_t)K * 4);
                memcpy(values + at, row + (H + G + g) * K, (size_t)K * 4);
            }
        }
        failed |= bitnet_attend(
            qkv, (H + 2 * G) * K, m, H, G, K, keys, values, c->sequence_stride, c->head_stride, c->token_stride, c->first,
            c->length + 1, y, d->threads, d->isa);
        failed |= multiply(d, &w->wo, &b, y, m, x, 1) || multiply(d, &w->gate_up, &b, x, m, gate_up, 0);
        bitnet_activate(gate_up, m, F, d->silu, d->exp_lanes, h, d->isa);
        failed |= multiply(d, &w->w2, &b, h, m, x, 1);
    }
    free(memory);
    return failed;
}
