// Sums of codes times activations for one strip of rows and a few tokens, one version per instruction set.
//
//     out[t * STRIP + r] = sum over K of code(row r) * x(token t)        r < rows <= STRIP, t < tokens
//
// `x` is arranged (see matmul.c): plane p of group g of a row meets x[(g * planes + p) * 64 ... + 63]. Rows end with a
// whole group, or with half of one (32 bytes; binary rows only).
#pragma once
#include "common.h"

typedef struct {
    const uint8_t *w;   // first row of the strip
    int64_t row_bytes;
    int rows, planes;   // planes: 4 (2 bits) or 8 (1 bit)
    const int8_t *x;
    int64_t x_stride;
    int tokens;
    int32_t *out;
} dot_args;

static void dot_portable(dot_args a) {
    const int bits = 8 / a.planes, mask = (1 << bits) - 1;
    for (int t = 0; t < a.tokens; t++)
        for (int r = 0; r < a.rows; r++) {
            const uint8_t *w = a.w + r * a.row_bytes;
            const int8_t *x = a.x + t * a.x_stride;
            int32_t sum = 0;
            for (int64_t i = 0; i < a.row_bytes; i += 32, w += 32)
                for (int p = 0; p < a.planes; p++) {
                    const int8_t *xp = x + (i / 64 * a.planes + p) * 64 + i % 64;
                    for (int j = 0; j < 32; j++) sum += (w[j] >> (bits * p) & mask) * xp[j];
                }
            a.out[t * STRIP + r] = sum;
        }
}

#if defined(__x86_64__)

TARGET_AVX2 static void dot_avx2(dot_args a) {
    const int bits = 8 / a.planes;
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1)), ones = _mm256_set1_epi16(1);
    for (int r = 0; r < a.rows; r++)
        for (int t = 0; t < a.tokens; t++) {
            const uint8_t *w = a.w + r * a.row_bytes;
            const int8_t *x = a.x + t * a.x_stride;
            __m256i sum = _mm256_setzero_si256();
            for (int64_t i = 0; i < a.row_bytes; i += 32) {
                __m256i packed = _mm256_loadu_si256((const __m256i *)(w + i));
                __m256i pairs = _mm256_setzero_si256();  // int16: at most 4 planes * 2 * 2 * 128, no overflow
                for (int p = 0; p < a.planes; p++) {
                    const int8_t *xp = x + (i / 64 * a.planes + p) * 64 + i % 64;
                    __m256i code = _mm256_and_si256(_mm256_srl_epi16(packed, _mm_cvtsi32_si128(bits * p)), mask);
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(code, _mm256_loadu_si256((const __m256i *)xp)));
                }
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
            }
            __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
            half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
            a.out[t * STRIP + r] = _mm_cvtsi128_si32(half);
        }
}

// acc += sums of four products u8 * s8. In assembly, since gcc 12 copies every accumulator around the intrinsic.
INLINE TARGET_AVX512 __m512i add_products(__m512i acc, __m512i code, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(code), "v"(x));
    return acc;
}

// One group of R rows times T tokens. Codes are masked where they lie: plane p then counts 2^(bits * p) fold, which its
// own accumulator gives back exactly at the end. No shift in the loop.
INLINE TARGET_AVX512 void dot_group(
    const __m512i *w, const int8_t *x, int64_t x_stride, __m512i acc[4][8], const int P, const int R, const int T) {
    const int bits = 8 / P;
    for (int p = 0; p < P; p++) {
        const __m512i mask = _mm512_set1_epi8((char)(((1 << bits) - 1) << (bits * p)));
        for (int t = 0; t < T; t++) {
            const __m512i xp = _mm512_load_si512(x + t * x_stride + p * 64);
            for (int r = 0; r < R; r++)
                acc[r * T + t][p] = add_products(acc[r * T + t][p], _mm512_and_si512(w[r], mask), xp);
        }
    }
}

// R rows times T tokens, with R * T <= 4 so that all sums fit the registers.
INLINE TARGET_AVX512 void dot_block(const dot_args *a, int r0, int t0, const int P, const int R, const int T) {
    const int bits = 8 / P;
    const int64_t rb = a->row_bytes, whole = rb / 64 * 64;
    const uint8_t *w = a->w + r0 * rb;
    const int8_t *x = a->x + t0 * a->x_stride;
    __m512i acc[4][8], group[4];
    for (int i = 0; i < R * T; i++)
        for (int p = 0; p < P; p++) acc[i][p] = _mm512_setzero_si512();
    for (int64_t g = 0; g < whole; g += 64, x += P * 64) {
        for (int r = 0; r < R; r++) {
            group[r] = _mm512_loadu_si512(w + r * rb + g);
            _mm_prefetch((const char *)(w + (r + R) * rb + g), _MM_HINT_T0);
            _mm_prefetch((const char *)(w + (r + 6 * R) * rb + g), _MM_HINT_T1);
        }
        dot_group(group, x, a->x_stride, acc, P, R, T);
    }
    if (whole < rb) {
        for (int r = 0; r < R; r++) group[r] = _mm512_maskz_loadu_epi8(0xffffffff, w + r * rb + whole);
        dot_group(group, x, a->x_stride, acc, P, R, T);
    }
    __m512i sum[4];
    for (int i = 0; i < 4; i++) {
        sum[i] = i < R * T ? acc[i][0] : _mm512_setzero_si512();
        for (int p = 1; p < P && i < R * T; p++)
            sum[i] = _mm512_add_epi32(sum[i], _mm512_srai_epi32(acc[i][p], bits * p));
    }
    int32_t lanes[4];
    _mm_storeu_si128((__m128i *)lanes, sum_lanes(sum[0], sum[1], sum[2], sum[3]));
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) a->out[(t0 + t) * STRIP + r0 + r] = lanes[r * T + t];
}

TARGET_AVX512 static void dot_avx512(dot_args a) {
    int t = 0;
    for (; a.planes == 4 && t + 4 <= a.tokens; t += 4)
        for (int r = 0; r < a.rows; r++) dot_block(&a, r, t, 4, 1, 4);
    for (; a.planes == 8 && t + 2 <= a.tokens; t += 2)
        for (int r = 0; r < a.rows; r++) dot_block(&a, r, t, 8, 1, 2);
    for (; t < a.tokens; t++) {
        int r = 0;
        for (; a.planes == 4 && r + 4 <= a.rows; r += 4) dot_block(&a, r, t, 4, 4, 1);
        for (; a.planes == 8 && r + 2 <= a.rows; r += 2) dot_block(&a, r, t, 8, 2, 1);
        for (; r < a.rows; r++) {
            if (a.planes == 4) dot_block(&a, r, t, 4, 1, 1);
            else dot_block(&a, r, t, 8, 1, 1);
        }
    }
}

#elif defined(__aarch64__)

TARGET_NEON static void dot_neon(dot_args a) {
    const int bits = 8 / a.planes;
    const uint8x16_t mask = vdupq_n_u8((uint8_t)((1 << bits) - 1));
    for (int t = 0; t < a.tokens; t++)
        for (int r = 0; r < a.rows; r++) {
            const uint8_t *w = a.w + r * a.row_bytes;
            const int8_t *x = a.x + t * a.x_stride;
            int32x4_t even = vdupq_n_s32(0), odd = vdupq_n_s32(0);
            for (int64_t i = 0; i < a.row_bytes; i += 16) {
                uint8x16_t packed = vld1q_u8(w + i);
                for (int p = 0; p < a.planes; p += 2) {
                    const int8_t *xp = x + (i / 64 * a.planes + p) * 64 + i % 64;
                    uint8x16_t low = vandq_u8(vshlq_u8(packed, vdupq_n_s8((int8_t)(-bits * p))), mask);
                    uint8x16_t high = vandq_u8(vshlq_u8(packed, vdupq_n_s8((int8_t)(-bits * (p + 1)))), mask);
                    even = vdotq_s32(even, vreinterpretq_s8_u8(low), vld1q_s8(xp));
                    odd = vdotq_s32(odd, vreinterpretq_s8_u8(high), vld1q_s8(xp + 64));
                }
            }
            a.out[t * STRIP + r] = vaddvq_s32(vaddq_s32(even, odd));
        }
}

#endif

INLINE void dot(dot_args a, int isa) {
#if defined(__x86_64__)
    if (isa >= AVX512) return dot_avx512(a);
    if (isa >= AVX2) return dot_avx2(a);
#elif defined(__aarch64__)
    if (isa >= NEON) return dot_neon(a);
#endif
    (void)isa;
    dot_portable(a);
}
