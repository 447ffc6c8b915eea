// RMSNorm, absmax and int8 rounding of activations in one pass over each token, bit for bit what torch computes.
//
// The one sum of floats in it, the mean of squares, is added in the order of torch's CPU reduction: `lanes` vector lanes,
// four vectors side by side, and a cascade of four levels. The caller finds out which `lanes` torch uses, and asks torch
// for the sums where none fits. Everything else is elementwise, in float32, one IEEE rounding per operation.
#include "common.h"
#include <math.h>

static int ceil_log2(int64_t n) { return n <= 2 ? 1 : 64 - __builtin_clzll((unsigned long long)n - 1); }

#define MEAN_OF_SQUARES(LANES)                                                                                         \
    typedef float vec##LANES __attribute__((vector_size(LANES * 4), aligned(4), may_alias));                           \
    INLINE float mean_of_squares_##LANES(const float *x, int64_t k) {                                                  \
        const int64_t vectors = k / LANES, steps = vectors / 4;                                                        \
        const vec##LANES *v = (const vec##LANES *)x;                                                                   \
        const int power = ceil_log2(steps) / 4 > 4 ? ceil_log2(steps) / 4 : 4;                                         \
        vec##LANES acc[4][4] = {0};                                                                                    \
        int64_t i = 0;                                                                                                 \
        while (i + (1 << power) <= steps) {                                                                            \
            for (int64_t end = i + (1 << power); i < end; i++)                                                         \
                for (int c = 0; c < 4; c++) acc[0][c] += v[i * 4 + c] * v[i * 4 + c];                                  \
            for (int level = 1; level < 4; level++) {                                                                  \
                for (int c = 0; c < 4; c++) acc[level][c] += acc[level - 1][c], acc[level - 1][c] = (vec##LANES){0};   \
                if (i & ((int64_t)((1 << power) - 1) << (level * power))) break;                                       \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < steps; i++)                                                                                         \
            for (int c = 0; c < 4; c++) acc[0][c] += v[i * 4 + c] * v[i * 4 + c];                                      \
        for (int level = 1; level < 4; level++)                                                                        \
            for (int c = 0; c < 4; c++) acc[0][c] += acc[level][c];                                                    \
        for (i = steps * 4; i < vectors; i++) acc[0][0] += v[i] * v[i];                                                \
        for (int c = 1; c < 4; c++) acc[0][0] += acc[0][c];                                                            \
        float sum = 0;                                                                                                 \
        for (i = vectors * LANES; i < k; i++) sum += x[i] * x[i];                                                      \
        for (int lane = 0; lane < LANES; lane++) sum += acc[0][0][lane];                                               \
        return sum / (float)k;                                                                                         \
    }
MEAN_OF_SQUARES(16)
MEAN_OF_SQUARES(8)
MEAN_OF_SQUARES(4)

INLINE float mean_of_squares(const float *x, int64_t k, int lanes) {
    return lanes == 16 ? mean_of_squares_16(x, k) : lanes == 8 ? mean_of_squares_8(x, k) : mean_of_squares_4(x, k);
}

// y = x * rsqrt(mean_square + eps) * weight (or x), then q = round(y * inv_scale) with inv_scale = 127 / max|y|.
INLINE void row(
    const float *x, int64_t k, const float *weight, float mean_square, float eps, float *y, int8_t *q, float *inv_scale,
    int32_t *row_sum) {
    if (weight) {
        const float r = 1.0f / sqrtf(mean_square + eps);
        for (int64_t i = 0; i < k; i++) y[i] = weight[i] * (x[i] * r);
        x = y;
    }
    // Magnitudes compare as integers, and there NaN and infinity are largest: neither can hide.
    int32_t largest = 0;
    for (int64_t i = 0; i < k; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float absmax;
    memcpy(&absmax, &largest, 4);
    if (!(absmax < INFINITY)) {  // torch would give NaN levels; int8 cannot, so the scale carries it
        memset(q, 0, (size_t)k);
        *inv_scale = NAN;
        *row_sum = 0;
        return;
    }
    const float inv = 1.0f / (absmax < 1e-5f ? 1e-5f : absmax) * 127.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) {
        const float shifted = x[i] * inv + 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        q[i] = (int8_t)bits;
        sum += (int8_t)bits;
    }
    *inv_scale = inv;
    *row_sum = sum;
}

typedef struct {
    const float *x;
    int64_t x_stride, m, k;
    const float *weight, *mean_square;
    float eps;
    int lanes;
    int8_t *q;
    float *inv_scale;
    int32_t *row_sum;
} rows_args;

INLINE void some_rows(const rows_args *a, int64_t from, int64_t to, float *y) {
    for (int64_t i = from; i < to; i++) {
        const float *x = a->x + i * a->x_stride;
        float mean = 0;
        if (a->mean_square) mean = a->mean_square[i];
        else if (a->weight) mean = mean_of_squares(x, a->k, a->lanes);
        row(x, a->k, a->weight, mean, a->eps, y, a->q + i * a->k, a->inv_scale + i, a->row_sum + i);
    }
}

static void rows_portable(const rows_args *a, int64_t from, int64_t to, float *y) { some_rows(a, from, to, y); }
#if defined(__x86_64__)
TARGET_AVX2 static void rows_avx2(const rows_args *a, int64_t from, int64_t to, float *y) { some_rows(a, from, to, y); }
TARGET_AVX512 static void rows_avx512(const rows_args *a, int64_t from, int64_t to, float *y) {
    some_rows(a, from, to, y);
}
#endif

int bitnet_norm_quantize(
    const float *x, int64_t x_stride, int64_t m, int64_t k, const float *weight, const float *mean_square, float eps,
    int lanes, int8_t *q, float *inv_scale, int32_t *row_sum, int threads, int isa) {
    const rows_args a = {x, x_stride, m, k, weight, mean_square, eps, lanes, q, inv_scale, row_sum};
    if (threads > m) threads = (int)m;
    int failed = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int part = 0; part < threads; part++) {
        const int64_t from = m * part / threads, to = m * (part + 1) / threads;
        float *y = weight ? aligned_alloc(64, ((size_t)k * 4 + 63) / 64 * 64) : NULL;
        if (weight && !y) failed = 1;
#if defined(__x86_64__)
        else if (isa >= AVX512) rows_avx512(&a, from, to, y);
        else if (isa >= AVX2) rows_avx2(&a, from, to, y);
#endif
        else rows_portable(&a, from, to, y);
        free(y);
    }
    (void)isa;
    return failed;
}

void bitnet_norm(
    const float *x, int64_t m, int64_t k, const float *weight, float eps, int lanes, float *y) {
    for (int64_t i = 0; i < m * k; i += k) {
        const float r = 1.0f / sqrtf(mean_of_squares(x + i, k, lanes) + eps);
        for (int64_t j = 0; j < k; j++) y[i + j] = weight[j] * (x[i + j] * r);
    }
}

typedef struct {
    const float *x, *weight, *rstd, *grad;
    int64_t m, k;
    float eps;
    int lanes;
    float *y, *grad_x;
} norm_args;

INLINE void norm_rows(const norm_args *a, int64_t from, int64_t to, float *rstd) {
    for (int64_t i = from; i < to; i++) {
        const float *x = a->x + i * a->k;
        const float r = 1.0f / sqrtf(mean_of_squares(x, a->k, a->lanes) + a->eps);
        for (int64_t j = 0; j < a->k; j++) a->y[i * a->k + j] = a->weight[j] * (x[j] * r);
        rstd[i] = r;
    }
}

// With n = x * r: d weight += grad * n, d x = r * (grad * weight - n * mean(grad * weight * n)).
INLINE void norm_gradient_rows(const norm_args *a, int64_t from, int64_t to, float *grad_weight) {
    const int64_t k = a->k;
    for (int64_t i = from; i < to; i++) {
        const float *x = a->x + i * k, *g = a->grad + i * k, r = a->rstd[i];
        float *out = a->grad_x + i * k, part[16] = {0}, mean = 0;
        int64_t j = 0;
        for (; j + 16 <= k; j += 16)
            for (int lane = 0; lane < 16; lane++) part[lane] += g[j + lane] * a->weight[j + lane] * x[j + lane];
        for (; j < k; j++) mean += g[j] * a->weight[j] * x[j];
        for (int lane = 0; lane < 16; lane++) mean += part[lane];
        mean = mean * r * r / (float)k;
        for (j = 0; j < k; j++) {
            grad_weight[j] += g[j] * x[j] * r;
            out[j] = r * (g[j] * a->weight[j] - x[j] * mean);
        }
    }
}

static void norm_portable(const norm_args *a, int64_t from, int64_t to, float *rstd) { norm_rows(a, from, to, rstd); }
static void gradient_portable(const norm_args *a, int64_t from, int64_t to, float *grad_weight) {
    norm_gradient_rows(a, from, to, grad_weight);
}
#if defined(__x86_64__)
TARGET_AVX512 static void norm_avx512(const norm_args *a, int64_t from, int64_t to, float *rstd) {
    norm_rows(a, from, to, rstd);
}
TARGET_AVX512 static void gradient_avx512(const norm_args *a, int64_t from, int64_t to, float *grad_weight) {
    norm_gradient_rows(a, from, to, grad_weight);
}
#endif

void bitnet_norm_forward(
    const float *x, int64_t m, int64_t k, const float *weight, float eps, int lanes, float *y, float *rstd, int threads,
    int isa) {
    const norm_args a = {x, weight, NULL, NULL, m, k, eps, lanes, y, NULL};
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        const int64_t from = m * part / threads, to = m * (part + 1) / threads;
#if defined(__x86_64__)
        if (isa >= AVX512) norm_avx512(&a, from, to, rstd);
        else
#endif
            norm_portable(&a, from, to, rstd);
    }
    (void)isa;
}

void bitnet_norm_backward(
    const float *grad, const float *x, const float *weight, const float *rstd, int64_t m, int64_t k, float *grad_x,
    float *grad_weight, int threads, int isa) {
    const norm_args a = {x, weight, rstd, grad, m, k, 0, 0, NULL, grad_x};
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        const int64_t from = m * part / threads, to = m * (part + 1) / threads;
#if defined(__x86_64__)
        if (isa >= AVX512) gradient_avx512(&a, from, to, grad_weight + part * k);
        else
#endif
            gradient_portable(&a, from, to, grad_weight + part * k);
    }
    (void)isa;
}

float bitnet_mean_of_squares(const float *x, int64_t k, int lanes) { return mean_of_squares(x, k, lanes); }
