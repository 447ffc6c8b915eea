// Packed matrix product with a scale for each group of inputs: y = sum over groups, in ascending order, of
// float32(int32 sum of the group) * scale, one rounding per operation. A group is one or more whole planes.
#include "common.h"

typedef struct {
    const int8_t *x;  // (M, whole blocks), zero-padded
    int64_t m, k_padded;
    const int32_t *x_sum;  // (M, groups)
    const uint8_t *w;
    int64_t row_bytes, n;
    int planes;
    const float *scale;  // (N, groups)
    int64_t groups, group_size;
    const float *x_inv;
    float *out;
} grouped;

INLINE void grouped_rows(const grouped *a, int64_t from, int64_t to) {
    const int bits = 8 / a->planes, mask = (1 << bits) - 1, factor = a->planes == 8 ? 2 : 1, plane = 256 / a->planes;
    for (int64_t n = from; n < to; n++)
        for (int64_t t = 0; t < a->m; t++) {
            float y = 0;
            for (int64_t g = 0; g < a->groups; g++) {
                int32_t sum = 0;
                const int64_t end = MIN((g + 1) * a->group_size, a->k_padded);
                for (int64_t k = g * a->group_size; k < end; k += plane) {
                    const int8_t *x = a->x + t * a->k_padded + k;
                    const uint8_t *w = a->w + n * a->row_bytes + k / 256 * plane;
                    const int shift = (int)(k % 256 / plane) * bits;
                    for (int half = 0; half < plane; half += 32)
                        for (int j = half; j < half + 32; j++) sum += (w[j] >> shift & mask) * x[j];
                }
                y += (float)(sum * factor - a->x_sum[t * a->groups + g]) * a->scale[n * a->groups + g];
            }
            a->out[t * a->n + n] = a->x_inv ? y / a->x_inv[t] : y;
        }
}

static void rows_portable(const grouped *a, int64_t from, int64_t to) { grouped_rows(a, from, to); }
#if defined(__x86_64__)
TARGET_AVX2 static void rows_avx2(const grouped *a, int64_t from, int64_t to) { grouped_rows(a, from, to); }
TARGET_AVX512 static void rows_avx512(const grouped *a, int64_t from, int64_t to) { grouped_rows(a, from, to); }
#endif

int bitnet_packed_matmul_grouped(
    const int8_t *x, int64_t x_stride, int64_t m, int64_t k, const uint8_t *w, int64_t row_bytes, int64_t n, int planes,
    const float *scale, int64_t group_size, const float *x_inv, float *out, int threads, int isa) {
    const int64_t k_padded = row_bytes * planes, groups = (k + group_size - 1) / group_size;
    int8_t *padded = calloc((size_t)(m * k_padded + 1), 1);
    int32_t *x_sum = calloc((size_t)(m * groups + 1), sizeof(int32_t));
    if (!padded || !x_sum) {
        free(padded);
        free(x_sum);
        return 1;
    }
    for (int64_t t = 0; t < m; t++) {
        memcpy(padded + t * k_padded, x + t * x_stride, (size_t)k);
        for (int64_t i = 0; i < k; i++) x_sum[t * groups + i / group_size] += x[t * x_stride + i];
    }
    const grouped a = {padded, m, k_padded, x_sum, w, row_bytes, n, planes, scale, groups, group_size, x_inv, out};
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        const int64_t from = n * part / threads, to = n * (part + 1) / threads;
#if defined(__x86_64__)
        if (isa >= AVX512) rows_avx512(&a, from, to);
        else if (isa >= AVX2) rows_avx2(&a, from, to);
        else
#endif
            rows_portable(&a, from, to);
    }
    (void)isa;
    free(padded);
    free(x_sum);
    return 0;
}
