// y (M, N) = x (M, K) float32 times a wide matrix w (N, K) that is stored in 8 or 16 bits: the output head of a model.
//
// At one token such a product is bound by the bytes of w, so nothing is gained by rounding x: codes become float32 in
// registers. int8 rows have a scale each, applied to the finished sum; float16 rows have none.
#include "common.h"

#if defined(__x86_64__)

// Sixteen weights as float32; `keep` masks those past the end of a row.
INLINE TARGET_AVX512 __m512 widen(const void *w, int64_t at, const int is_int8, __mmask16 keep) {
    return is_int8 ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(keep, (const int8_t *)w + at)))
                   : _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(keep, (const uint16_t *)w + at));
}

// Four rows side by side, and those that come next fetched ahead.
INLINE TARGET_AVX512 void wide_rows(
    const float *x, int64_t k, const void *w, const int is_int8, const float *scale, float *y, int64_t n, const int rows) {
    const int size = is_int8 ? 1 : 2;
    __m512 acc[4][2];
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask16 low = k - i >= 16 ? 0xffff : (__mmask16)((1u << (k - i)) - 1);
        const __mmask16 high = k - i >= 32 ? 0xffff : k - i <= 16 ? 0 : (__mmask16)((1u << (k - i - 16)) - 1);
        const __m512 x0 = _mm512_maskz_loadu_ps(low, x + i), x1 = _mm512_maskz_loadu_ps(high, x + i + 16);
        for (int r = 0; r < rows; r++) {
            const int64_t at = (n + r) * k + i;
            acc[r][0] = _mm512_fmadd_ps(widen(w, at, is_int8, low), x0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(widen(w, at + 16, is_int8, high), x1, acc[r][1]);
            if (i % 64 == 0 || !is_int8) _mm_prefetch((const char *)w + (at + rows * k) * size, _MM_HINT_T0);
        }
    }
    for (int r = 0; r < rows; r++) {
        const float sum = _mm512_reduce_add_ps(_mm512_add_ps(acc[r][0], acc[r][1]));
        y[n + r] = is_int8 ? sum * scale[n + r] : sum;
    }
}

TARGET_AVX512 static void wide_avx512(
    const float *x, int64_t k, const void *w, int is_int8, const float *scale, float *y, int64_t from, int64_t to) {
    int64_t n = from;
    for (; n + 4 <= to; n += 4) {
        if (is_int8) wide_rows(x, k, w, 1, scale, y, n, 4);
        else wide_rows(x, k, w, 0, scale, y, n, 4);
    }
    for (; n < to; n++) {
        if (is_int8) wide_rows(x, k, w, 1, scale, y, n, 1);
        else wide_rows(x, k, w, 0, scale, y, n, 1);
    }
}

TARGET_AVX2 static void wide_avx2(
    const float *x, int64_t k, const void *w, int is_int8, const float *scale, float *y, int64_t from, int64_t to) {
    const int64_t whole = k / 16 * 16;
    for (int64_t n = from; n < to; n++) {
        __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        const int8_t *w8 = (const int8_t *)w + n * k;
        const uint16_t *w16 = (const uint16_t *)w + n * k;
        for (int64_t i = 0; i < whole; i += 16)
            for (int c = 0; c < 2; c++) {
                __m256 v = is_int8
                    ? _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w8 + i + 8 * c))))
                    : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w16 + i + 8 * c)));
                acc[c] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + i + 8 * c), acc[c]);
            }
        float lanes[8], sum = 0;
        _mm256_storeu_ps(lanes, _mm256_add_ps(acc[0], acc[1]));
        for (int i = 0; i < 8; i++) sum += lanes[i];
        for (int64_t i = whole; i < k; i++) sum += x[i] * (is_int8 ? (float)w8[i] : _cvtsh_ss(w16[i]));
        y[n] = is_int8 ? sum * scale[n] : sum;
    }
}

#endif

int bitnet_wide_matmul(
    const float *x, int64_t m, int64_t k, const void *w, int64_t n, int is_int8, const float *scale, float *y,
    int threads, int isa) {
#if defined(__x86_64__)
    if (isa < AVX2) return 1;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        for (int64_t t = 0; t < m; t++)
            (isa >= AVX512 ? wide_avx512 : wide_avx2)(
                x + t * k, k, w, is_int8, scale, y + t * n, n * part / threads, n * (part + 1) / threads);
    return 0;
#else
    (void)x, (void)m, (void)k, (void)w, (void)n, (void)is_int8, (void)scale, (void)y, (void)threads, (void)isa;
    return 1;
#endif
}
