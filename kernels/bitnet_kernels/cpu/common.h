// What every source file of the CPU kernels shares: instruction sets, and the names used in them.
//
// M tokens, N output features, K inputs. Weights are rows of codes (see ../formats.py): ternary c = w + 1 in 2 bits,
// binary b in 1 bit, `planes` = 4 or 8 codes per byte. A *group* is 64 packed bytes of a row; plane p of a group meets
// 64 consecutive bytes of the arranged activations. Everything here is exact integer arithmetic until the epilogue.
#pragma once
#include "api.h"
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define TARGET_AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,amx-tile,amx-int8")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

// In ascending order: each includes those before it on its own architecture. ../cpu/native.py names them too.
enum isa { PORTABLE = 0, NEON = 1, AVX2 = 2, AVX512 = 3, AMX = 4 };

// The version of a function that was compiled for `isa`: NAME_avx512, NAME_avx2 or NAME_portable.
#if defined(__x86_64__)
#define CALL_FOR_ISA(NAME, ...)                                                                                        \
    (isa >= AVX512 ? NAME##_avx512(__VA_ARGS__) : isa >= AVX2 ? NAME##_avx2(__VA_ARGS__) : NAME##_portable(__VA_ARGS__))
#else
#define CALL_FOR_ISA(NAME, ...) NAME##_portable(__VA_ARGS__)
#endif

// Rows of weights handled together, and tokens of one tile.
enum { STRIP = 32, TILE = 16 };

#if defined(__x86_64__)

// Sums of the 16 lanes of four vectors, as four lanes.
INLINE TARGET_AVX512 __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#endif
