// Output gradients as one or two int8 digits, with a scale for each token or for each output.
//
// Two digits are 16-bit fixed point: v = round(g * 32639 / absmax), high = round(v / 256), low = v - 256 high, and
// 32639 = 127 * 257 keeps both inside int8. Then a product of 16 bits is two products of int8.
#include "common.h"
#include <math.h>

typedef struct {
    const float *g, *row_inv;  // (m, n); divisors of the rows (m) or null
    int64_t m, n;
    int digits;
    int8_t *high, *low;
    float *inv_scale;
} gradient_args;

INLINE float levels_of(int digits) { return digits == 2 ? 32639.0f : 127.0f; }

// Largest magnitude as bits, which compare as integers; NaN is largest.
INLINE int32_t magnitude(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

INLINE float inv_scale_of(int32_t largest, int digits) {
    float absmax;
    memcpy(&absmax, &largest, 4);
    if (!(absmax < INFINITY)) return NAN;
    // A gradient may be far below 1e-5: only zero has no scale, and below 1e-30 the reciprocal would overflow.
    return absmax < 1e-30f ? 1.0f : levels_of(digits) / absmax;
}

INLINE void digits_of(const gradient_args *a, int64_t row, float factor, const float *factors) {
    const float *g = a->g + row * a->n;
    const float inv = a->row_inv ? 1.0f / a->row_inv[row] : 1.0f;
    int8_t *high = a->high + row * a->n, *low = a->low + row * a->n;
    for (int64_t j = 0; j < a->n; j++) {
        float v = g[j] * inv * (factors ? factors[j] : factor);
        v = v - v == 0.0f ? v : 0.0f;  // where there is no scale there is no digit
        v += 12582912.0f;
        int32_t bits;
        memcpy(&bits, &v, 4);
        const int32_t whole = bits - 0x4b400000;
        if (a->digits == 2) {
            const int32_t top = (whole + 128) >> 8;
            high[j] = (int8_t)top, low[j] = (int8_t)(whole - top * 256);
        } else high[j] = (int8_t)whole;
    }
}

INLINE void some_rows(const gradient_args *a, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        const float *g = a->g + i * a->n;
        const float inv = a->row_inv ? 1.0f / a->row_inv[i] : 1.0f;
        int32_t largest = 0;
        for (int64_t j = 0; j < a->n; j++) {
            const int32_t size = magnitude(g[j] * inv);
            largest = size > largest ? size : largest;
        }
        a->inv_scale[i] = inv_scale_of(largest, a->digits);
        digits_of(a, i, a->inv_scale[i], NULL);
    }
}

INLINE void column_magnitudes(const gradient_args *a, int64_t from, int64_t to, int32_t *largest) {
    for (int64_t i = from; i < to; i++) {
        const float *g = a->g + i * a->n;
        const float inv = a->row_inv ? 1.0f / a->row_inv[i] : 1.0f;
        for (int64_t j = 0; j < a->n; j++) {
            const int32_t size = magnitude(g[j] * inv);
            largest[j] = size > largest[j] ? size : largest[j];
        }
    }
}

INLINE void some_digits(const gradient_args *a, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) digits_of(a, i, 0.0f, a->inv_scale);
}

#define FOR_ISA(NAME, TARGET)                                                                                          \
    TARGET static void rows_##NAME(const gradient_args *a, int64_t from, int64_t to) { some_rows(a, from, to); }       \
    TARGET static void digits_##NAME(const gradient_args *a, int64_t from, int64_t to) { some_digits(a, from, to); }   \
    TARGET static void columns_##NAME(const gradient_args *a, int64_t from, int64_t to, int32_t *largest) {            \
        column_magnitudes(a, from, to, largest);                                                                       \
    }
FOR_ISA(portable, )
#if defined(__x86_64__)
FOR_ISA(avx2, TARGET_AVX2)
FOR_ISA(avx512, TARGET_AVX512)
#endif

int bitnet_gradient_digits(
    const float *g, const float *row_inv, int64_t m, int64_t n, int per_column, int digits, int8_t *high, int8_t *low,
    float *inv_scale, int threads, int isa) {
    const gradient_args a = {g, row_inv, m, n, digits, high, low, inv_scale};
    int32_t *largest = per_column ? calloc((size_t)(threads * n), 4) : NULL;
    if (per_column && !largest) return 1;
    if (!per_column) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
        for (int part = 0; part < threads; part++) CALL_FOR_ISA(rows, &a, m * part / threads, m * (part + 1) / threads);
        return 0;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        CALL_FOR_ISA(columns, &a, m * part / threads, m * (part + 1) / threads, largest + part * n);
    for (int64_t j = 0; j < n; j++) {
        for (int part = 1; part < threads; part++)
            largest[j] = largest[part * n + j] > largest[j] ? largest[part * n + j] : largest[j];
        inv_scale[j] = inv_scale_of(largest[j], digits);
    }
    free(largest);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) CALL_FOR_ISA(digits, &a, m * part / threads, m * (part + 1) / threads);
    return 0;
}

void bitnet_join_digits(
    const int32_t *high, const int32_t *low, int64_t m, int64_t n, const float *row_inv, float scale, float *out,
    int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        for (int64_t i = m * part / threads; i < m * (part + 1) / threads; i++) {
            const float factor = 1.0f / (row_inv[i] * scale);
            const int32_t *h = high + i * n, *l = low ? low + i * n : NULL;
            float *y = out + i * n;
            if (l)
                for (int64_t j = 0; j < n; j++) y[j] = ((float)h[j] * 256.0f + (float)l[j]) * factor;
            else
                for (int64_t j = 0; j < n; j++) y[j] = (float)h[j] * factor;
        }
}
