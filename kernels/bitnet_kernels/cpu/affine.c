// Products with weights on an integer grid of 2 to 8 bits; each group of inputs has its scale and zero point.
//
//   int8 activations    y = sum over g of float32(sum over k in g of (c - z) * x) * scale, / x_inv   (sums exact)
//   float activations   y = sum over g of scale * sum over k in g of (c - z) * x                     (or of table[c] * x)
//
// A row of codes is widened to bytes once and then meets every token. Layout of the codes: ../formats.py.
#include "common.h"

typedef struct {
    const void *x;       // int8 or float, (M, K)
    int64_t x_stride, m, k, k_padded;
    const uint8_t *w;    // (N, row bytes)
    int64_t row_bytes;
    int bits;
    const float *scale;  // (N, G)
    const float *zero;   // (N, G), integers
    const float *table;  // 2^bits levels instead of c - z, or NULL
    int64_t groups, group_size, n;
    const float *x_inv;
    float *out;
    const int32_t *x_sum;  // (M, G), of int8 activations
} affine_args;

// Parts of `width` bits lie one after another in a row, the lowest bits of the codes first.
INLINE void widen_codes(const uint8_t *w, int64_t k_padded, int bits, uint8_t *restrict codes) {
    int done = 0;
    memset(codes, 0, (size_t)k_padded);
    for (int width = 8; width; width /= 2) {
        if (!(bits & width)) continue;
        const int planes = 8 / width, mask = (1 << width) - 1, plane = 256 / planes;
        for (int64_t block = 0; block < k_padded; block += 256)
            for (int p = 0; p < planes; p++) {
                const uint8_t *from = w + block / planes;
                uint8_t *to = codes + block + p * plane;
                for (int j = 0; j < plane; j++) to[j] |= (uint8_t)((from[j] >> (p * width) & mask) << done);
            }
        w += k_padded / planes;
        done += width;
    }
}

INLINE void int_row(const affine_args *a, int64_t n, const uint8_t *codes) {
    const float *scale = a->scale + n * a->groups, *zero = a->zero + n * a->groups;
    for (int64_t t = 0; t < a->m; t++) {
        const int8_t *x = (const int8_t *)a->x + t * a->x_stride;
        float y = 0;
        for (int64_t g = 0; g < a->groups; g++) {
            const int64_t from = g * a->group_size, end = MIN(from + a->group_size, a->k);
            int32_t sum = 0;
            for (int64_t k = from; k < end; k++) sum += codes[k] * x[k];
            y += (float)(sum - (int32_t)zero[g] * a->x_sum[t * a->groups + g]) * scale[g];
        }
        a->out[t * a->n + n] = y / a->x_inv[t];
    }
}

INLINE void float_row(const affine_args *a, int64_t n, const uint8_t *codes, float *restrict wide) {
    const float *scale = a->scale + n * a->groups, *zero = a->zero + n * a->groups;
    for (int64_t g = 0; g < a->groups; g++) {
        const int64_t from = g * a->group_size, end = MIN(from + a->group_size, a->k);
        const float z = zero[g];
        if (a->table)
            for (int64_t k = from; k < end; k++) wide[k] = a->table[codes[k]] * scale[g];
        else
            for (int64_t k = from; k < end; k++) wide[k] = ((float)codes[k] - z) * scale[g];
    }
    for (int64_t t = 0; t < a->m; t++) {
        const float *x = (const float *)a->x + t * a->x_stride;
        float lanes[16] = {0}, y = 0;
        const int64_t whole = a->k / 16 * 16;
        for (int64_t k = 0; k < whole; k += 16)
            for (int j = 0; j < 16; j++) lanes[j] += wide[k + j] * x[k + j];
        for (int j = 0; j < 16; j++) y += lanes[j];
        for (int64_t k = whole; k < a->k; k++) y += wide[k] * x[k];
        a->out[t * a->n + n] = y;
    }
}

INLINE void rows(const affine_args *a, int64_t from, int64_t to, uint8_t *codes, float *wide, int is_float) {
    for (int64_t n = from; n < to; n++) {
        widen_codes(a->w + n * a->row_bytes, a->k_padded, a->bits, codes);
        if (is_float) float_row(a, n, codes, wide);
        else int_row(a, n, codes);
    }
}

static void rows_portable(const affine_args *a, int64_t from, int64_t to, uint8_t *codes, float *wide, int is_float) {
    rows(a, from, to, codes, wide, is_float);
}
#if defined(__x86_64__)
TARGET_AVX2 static void rows_avx2(
    const affine_args *a, int64_t from, int64_t to, uint8_t *codes, float *wide, int is_float) {
    rows(a, from, to, codes, wide, is_float);
}

// As widen_codes, 64 or 32 bytes of packed codes at a time. Codes of 8 bits are read where they lie.
INLINE TARGET_AVX512 const uint8_t *widen_avx512(const uint8_t *w, int64_t k_padded, int bits, uint8_t *codes) {
    if (bits == 8) return w;
    int done = 0;
    for (int width = 4; width; width /= 2) {
        if (!(bits & width)) continue;
        const int planes = 8 / width, plane = 256 / planes;
        const __m512i mask = _mm512_set1_epi8((char)((1 << width) - 1));
        const __m128i up = _mm_cvtsi32_si128(done);
        for (int64_t block = 0; block < k_padded; block += 256)
            for (int at = 0; at < 256; at += 64) {
                // Planes of one bit are 32 bytes: two of them, shifted by one more in the upper half.
                const uint8_t *from = w + block / planes + at % plane;
                const int shift = at / plane * width;
                const __m512i packed = width == 1
                    ? _mm512_srlv_epi64(
                          _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(w + block / planes))),
                          _mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0))
                    : _mm512_loadu_si512(from);
                __m512i c = _mm512_and_si512(_mm512_srl_epi64(packed, _mm_cvtsi32_si128(shift)), mask);
                if (done) c = _mm512_or_si512(_mm512_sll_epi64(c, up), _mm512_loadu_si512(codes + block + at));
                _mm512_storeu_si512(codes + block + at, c);
            }
        w += k_padded / planes;
        done += width;
    }
    return codes;
}

INLINE TARGET_AVX512 __m512i group_sum(const uint8_t *codes, const int8_t *x, int64_t size) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < size; k += 64) {
        const __mmask64 keep = size - k >= 64 ? ~0ull : (1ull << (size - k)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(keep, codes + k), _mm512_maskz_loadu_epi8(keep, x + k));
    }
    return sum;
}

INLINE TARGET_AVX512 void int_row_avx512(const affine_args *a, int64_t n, const uint8_t *codes) {
    const float *scale = a->scale + n * a->groups, *zero = a->zero + n * a->groups;
    const int64_t size = a->group_size;
    for (int64_t t = 0; t < a->m; t++) {
        const int8_t *x = (const int8_t *)a->x + t * a->x_stride;
        const int32_t *x_sum = a->x_sum + t * a->groups;
        float y = 0;
        int64_t g = 0;
        for (; g + 4 <= a->groups && (g + 4) * size <= a->k; g += 4) {
            const __m128i sums = sum_lanes(
                group_sum(codes + g * size, x + g * size, size),
                group_sum(codes + (g + 1) * size, x + (g + 1) * size, size),
                group_sum(codes + (g + 2) * size, x + (g + 2) * size, size),
                group_sum(codes + (g + 3) * size, x + (g + 3) * size, size));
            const __m128i z = _mm_cvtps_epi32(_mm_loadu_ps(zero + g));
            const __m128i of_zero = _mm_mullo_epi32(z, _mm_loadu_si128((const __m128i *)(x_sum + g)));
            const __m128i centered = _mm_sub_epi32(sums, of_zero);
            float parts[4];
            _mm_storeu_ps(parts, _mm_mul_ps(_mm_cvtepi32_ps(centered), _mm_loadu_ps(scale + g)));
            for (int i = 0; i < 4; i++) y += parts[i];
        }
        for (; g < a->groups; g++) {
            const int64_t from = g * size;
            const int32_t sum = _mm512_reduce_add_epi32(group_sum(codes + from, x + from, MIN(size, a->k - from)));
            y += (float)(sum - (int32_t)zero[g] * x_sum[g]) * scale[g];
        }
        a->out[t * a->n + n] = y / a->x_inv[t];
    }
}

INLINE TARGET_AVX512 __m512 level_of(const uint8_t *codes, __mmask16 keep, __m512 z, __m512 table, const int listed) {
    const __m512i c = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(keep, codes));
    return listed ? _mm512_permutexvar_ps(c, table) : _mm512_sub_ps(_mm512_cvtepi32_ps(c), z);
}

INLINE TARGET_AVX512 void float_row_avx512(const affine_args *a, int64_t n, const uint8_t *codes, const int listed) {
    const float *scale = a->scale + n * a->groups, *zero = a->zero + n * a->groups;
    const __mmask16 levels = listed ? (__mmask16)((1u << (1 << a->bits)) - 1) : 0;
    const __m512 table = _mm512_maskz_loadu_ps(levels, a->table);
    for (int64_t t = 0; t < a->m; t++) {
        const float *x = (const float *)a->x + t * a->x_stride;
        __m512 total = _mm512_setzero_ps();
        for (int64_t g = 0; g < a->groups; g++) {
            const int64_t from = g * a->group_size, end = MIN(from + a->group_size, a->k);
            const __m512 z = _mm512_set1_ps(zero[g]);
            __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t k = from, i = 0; k < end; k += 16, i ^= 1) {
                const __mmask16 keep = end - k >= 16 ? 0xffff : (__mmask16)((1u << (end - k)) - 1);
                const __m512 level = level_of(codes + k, keep, z, table, listed);
                sum[i] = _mm512_fmadd_ps(level, _mm512_maskz_loadu_ps(keep, x + k), sum[i]);
            }
            total = _mm512_fmadd_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_set1_ps(scale[g]), total);
        }
        a->out[t * a->n + n] = _mm512_reduce_add_ps(total);
    }
}

TARGET_AVX512 static void rows_avx512(
    const affine_args *a, int64_t from, int64_t to, uint8_t *codes, float *wide, int is_float) {
    for (int64_t n = from; n < to; n++) {
        const uint8_t *row = widen_avx512(a->w + n * a->row_bytes, a->k_padded, a->bits, codes);
        if (!is_float) int_row_avx512(a, n, row);
        else if (!a->table) float_row_avx512(a, n, row, 0);
        else if (a->bits <= 4) float_row_avx512(a, n, row, 1);
        else float_row(a, n, row, wide);
    }
}
#endif

int bitnet_affine_matmul(
    const void *x, int is_float, int64_t x_stride, int64_t m, int64_t k, const uint8_t *w, int64_t row_bytes, int64_t n,
    int bits, const float *scale, const float *zero, const float *table, int64_t group_size, const float *x_inv,
    float *out, int threads, int isa) {
    const int64_t k_padded = row_bytes * 8 / bits;
    const int64_t groups = (k + group_size - 1) / group_size;
    int32_t *x_sum = NULL;
    if (!is_float) {
        x_sum = calloc((size_t)(m * groups + 1), sizeof(int32_t));
        if (!x_sum) return 1;
        for (int64_t t = 0; t < m; t++)
            for (int64_t i = 0; i < k; i++) x_sum[t * groups + i / group_size] += ((const int8_t *)x)[t * x_stride + i];
    }
    const affine_args a = {
        x, x_stride, m, k, k_padded, w, row_bytes, bits, scale, zero, table, groups, group_size, n, x_inv, out, x_sum};
    int failed = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int part = 0; part < threads; part++) {
        const int64_t from = n * part / threads, to = n * (part + 1) / threads;
        uint8_t *codes = malloc((size_t)k_padded + 64);
        float *wide = malloc((size_t)(k_padded + 16) * sizeof(float));
        if (!codes || !wide) failed = 1;
#if defined(__x86_64__)
        else if (isa >= AVX512) rows_avx512(&a, from, to, codes, wide, is_float);
        else if (isa >= AVX2) rows_avx2(&a, from, to, codes, wide, is_float);
#endif
        else rows_portable(&a, from, to, codes, wide, is_float);
        free(codes);
        free(wide);
    }
    free(x_sum);
    (void)isa;
    return failed;
}
