// All blocks of a transformer for one new token per sequence, in one call, with the results of the operators one by one:
//
//     x += wo(quantize(sub-norm(attention(rotate(wq|wk|wv (quantize(norm x)))))))
//     x += w2(quantize(sub-norm(activation(gate) * up)))           gate|up = w1|w3 (quantize(norm x))
//
// A layer of a small model takes less time than the calls around it; here there are none.
#include "common.h"
#include "floats.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

// What a thread has for itself: its place among the others, quantized activations, the activated gate, scores of a head.
typedef struct {
    int part, parts;
    int8_t *q;
    float *inv;
    int32_t *sum;
    float *h, *p;
    int isa;
} worker;

// x (M, K) -> this thread's share of the columns of out (M, N), or that share added to out through `product`. Every
// thread quantizes all of x: to wait for one that does it takes longer.
static int multiply(
    const decoder *d, const readers *r, const worker *b, const float *x, int64_t m, float *out, float *product) {
    float *y = product ? product : out;
    if (bitnet_norm_quantize(x, r->k, m, r->k, r->norm, NULL, r->eps, d->sum_lanes, b->q, b->inv, b->sum, 1, b->isa) ||
        bitnet_matmul_share(
            b->q, m, r->k, r->w, r->row_bytes, r->n, (int)r->planes, b->sum, b->inv, r->w_inv, r->w_inv_stride, y, b->part,
            b->parts, b->isa))
        return 1;
    if (product) {
        const int64_t strips = (r->n + STRIP - 1) / STRIP;
        const int64_t from = strips * b->part / b->parts * STRIP, to = MIN(strips * (b->part + 1) / b->parts * STRIP, r->n);
        for (int64_t t = 0; t < m; t++)
            for (int64_t i = from; i < to; i++) out[t * r->n + i] += product[t * r->n + i];
    }
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

// Rotate what belongs to some key heads, put their keys and values into the cache, and attend. Heads of all sequences are
// numbered together; a thread takes those that share a key head, so that it waits for nobody.
static void attend(
    const decoder *d, const cache *c, const worker *b, float *qkv, int64_t m, const float *cos, const float *sin,
    int64_t angle_stride, float *keys, float *values, float *y) {
    const int64_t H = d->heads, G = d->kv_heads, K = d->head_dim, group = H / G, width = (H + 2 * G) * K;
    const attention_args a = {qkv, width, m, H, G, K, keys, values, c->sequence_stride, c->head_stride, c->token_stride,
                              c->first, c->length + 1, y};
    for (int64_t i = m * G * b->part / b->parts; i < m * G * (b->part + 1) / b->parts; i++) {
        const int64_t t = i / G, g = i % G;
        const float *angle_cos = cos + t * angle_stride, *angle_sin = sin + t * angle_stride;
        float *row = qkv + t * width;
        const int64_t at = t * c->sequence_stride + g * c->head_stride + c->length * c->token_stride;
        for (int64_t h = g * group; h < (g + 1) * group; h++) rotate(row + h * K, K, angle_cos, angle_sin);
        rotate(row + (H + g) * K, K, angle_cos, angle_sin);
        memcpy(keys + at, row + (H + g) * K, (size_t)K * 4);
        memcpy(values + at, row + (H + G + g) * K, (size_t)K * 4);
        bitnet_attend_heads(&a, t * H + g * group, t * H + (g + 1) * group, b->p, b->isa);
    }
}

int bitnet_decode(
    const decoder *d, const cache *c, float *x, int64_t m, const float *cos, const float *sin, int64_t angle_stride,
    int threads, int isa) {
    const int64_t H = d->heads, G = d->kv_heads, K = d->head_dim, D = H * K, F = d->blocks->w2.k;
    const int64_t widest = D > F ? D : F;
    float *const shared = aligned_alloc(64, ((size_t)(m * ((H + 2 * G) * K + 2 * D + 2 * F)) * 4 + 63) / 64 * 64);
    if (!shared) return 1;
    float *const qkv = shared, *const y = qkv + m * (H + 2 * G) * K, *const gate_up = y + m * D;
    float *const product = gate_up + m * 2 * F;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        const size_t floats = (size_t)(m * F + c->length + 1 + 2 * m), bytes = floats * 4 + (size_t)(m * widest);
        float *const own = aligned_alloc(64, (bytes + 63) / 64 * 64);
        float *const inv = own + m * F + c->length + 1;
        int32_t *const sum = (int32_t *)(inv + m);
        const worker b = {omp_get_thread_num(), omp_get_num_threads(), (int8_t *)(sum + m), inv, sum, own, own + m * F,
                          isa};
        failed = !own;
        for (int64_t layer = 0; layer < d->layers; layer++) {
            const block *w = d->blocks + layer;
            float *keys = c->keys + layer * c->layer_stride, *values = c->values + layer * c->layer_stride;
            // A thread without memory leaves its share undone, but meets the others at every barrier.
            if (!failed) failed = multiply(d, &w->qkv, &b, x, m, qkv, NULL);
#pragma omp barrier
            if (!failed) attend(d, c, &b, qkv, m, cos, sin, angle_stride, keys, values, y);
#pragma omp barrier
            if (!failed) failed = multiply(d, &w->wo, &b, y, m, x, product);
#pragma omp barrier
            if (!failed) failed = multiply(d, &w->gate_up, &b, x, m, gate_up, NULL);
#pragma omp barrier
            if (!failed) {
                bitnet_activate(gate_up, m, F, d->silu, d->exp_lanes, b.h, isa);
                failed = multiply(d, &w->w2, &b, b.h, m, x, product);
            }
#pragma omp barrier
        }
        free(own);
    }
    if (!failed) bitnet_norm(x, m, D, d->last_norm, d->last_eps, d->sum_lanes, x);
    free(shared);
    return failed;
}
