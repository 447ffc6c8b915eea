// Attention of one new token per sequence over its cached keys and values, in float32.
//
// Serves both sides, the model as it was trained and the packed one, whenever a single token is decoded on the CPU. Sums
// have 16 lanes whatever the instruction set, and no fused multiply-add, so all builds give the same bits.
#include "common.h"
#include "floats.h"

INLINE float dot_floats(const float *a, const float *b, int64_t k) {
    vec16 sum = {0};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) sum += *(const vec16 *)(a + i) * *(const vec16 *)(b + i);
    float rest = 0;
    for (; i < k; i++) rest += a[i] * b[i];
    return sum16(sum) + rest;
}

// `vectors` times 16 elements of the mean of values, weighted by p.
INLINE void weigh(
    const float *values, int64_t stride, const float *p, int64_t n, float total, const int vectors, float *out) {
    vec16 sum[4] = {0};
    for (int64_t s = 0; s < n; s++)
        for (int c = 0; c < vectors; c++) sum[c] += p[s] * *(const vec16 *)(values + s * stride + c * 16);
    for (int c = 0; c < vectors; c++) *(vec16 *)(out + c * 16) = sum[c] / total;
}

INLINE void one_head(const attention_args *a, int64_t pair, float *p) {
    const int64_t t = pair / a->heads, h = pair % a->heads, K = a->head_dim;
    const int64_t at = t * a->sequence_stride + h / (a->heads / a->kv_heads) * a->head_stride;
    const int64_t first = a->first ? a->first[t] : 0, n = a->tokens - first;
    const float *q = a->q + t * a->q_stride + h * K;
    const float *keys = a->keys + at + first * a->token_stride, *values = a->values + at + first * a->token_stride;
    const float scale = 1.0f / sqrtf((float)K);
    float largest = -INFINITY;
    for (int64_t s = 0; s < n; s++) {
        p[s] = dot_floats(q, keys + s * a->token_stride, K) * scale;
        largest = p[s] > largest ? p[s] : largest;
    }
    for (int64_t s = 0; s < n; s++) p[s] = exp_u10(p[s] - largest);
    float total = 0;
    for (int64_t s = 0; s < n; s++) total += p[s];
    float *out = a->out + t * a->heads * K + h * K;
    int64_t i = 0;
    for (; i + 64 <= K; i += 64) weigh(values + i, a->token_stride, p, n, total, 4, out + i);
    for (; i + 16 <= K; i += 16) weigh(values + i, a->token_stride, p, n, total, 1, out + i);
    for (; i < K; i++) {
        float sum = 0;
        for (int64_t s = 0; s < n; s++) sum += p[s] * values[s * a->token_stride + i];
        out[i] = sum / total;
    }
}

#define HEADS(NAME, TARGET)                                                                                            \
    TARGET static void NAME(const attention_args *a, int64_t from, int64_t to, float *p) {                             \
        for (int64_t pair = from; pair < to; pair++) one_head(a, pair, p);                                             \
    }
HEADS(heads_portable, )
#if defined(__x86_64__)
HEADS(heads_avx2, TARGET_AVX2)
HEADS(heads_avx512, TARGET_AVX512)
#endif

void bitnet_attend_heads(const attention_args *a, int64_t from, int64_t to, float *p, int isa) {
#if defined(__x86_64__)
    if (isa >= AVX512) return heads_avx512(a, from, to, p);
    if (isa >= AVX2) return heads_avx2(a, from, to, p);
#endif
    (void)isa;
    heads_portable(a, from, to, p);
}

int bitnet_attend(const attention_args *a, int threads, int isa) {
    const int64_t pairs = a->m * a->heads;
    int failed = 0;
    if (threads > pairs) threads = (int)pairs;
    if (pairs * a->tokens * a->head_dim < 1 << 16) threads = 1;  // less work than waking a thread
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int part = 0; part < threads; part++) {
        const int64_t from = pairs * part / threads, to = pairs * (part + 1) / threads;
        float *p = aligned_alloc(64, ((size_t)a->tokens * 4 + 63) / 64 * 64);
        if (p) bitnet_attend_heads(a, from, to, p, isa);
        else failed = 1;
        free(p);
    }
    return failed;
}
