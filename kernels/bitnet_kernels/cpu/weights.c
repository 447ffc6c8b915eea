// From latent weights to levels and to packed codes: what training does to every matrix in every step.
//
// The sums are whole numbers of 2^-40 and added as integers, so that no order and no split can change them: see
// exact_sums in bitnet/quantizers.py, which computes the same with torch.
#include "common.h"

// 1.5 * 2^52: adding it leaves the integer, rounded half to even, in the lowest bits of a double.
#define MAGIC 6755399441055744.0
#define LARGEST 1024.0f
enum { RUN = 256 };  // 2^8 weights below 2^10 on the grid of 2^-40 stay inside 63 bits

INLINE int64_t on_grid(float w) {
    const double shifted = (double)w * 1099511627776.0 + MAGIC;
    int64_t bits;
    memcpy(&bits, &shifted, 8);
    return bits - 0x4338000000000000;
}

typedef struct {
    int64_t high[2], low[2];  // counts of 2^-14 and 2^-40: of magnitudes, and of signed weights
    int wrong;                // a weight that is too large for this, infinite or NaN
} sums;

INLINE void some_sums(const float *w, int64_t from, int64_t to, int with_sign, sums *s) {
    for (int64_t start = from; start < to; start += RUN) {
        const int64_t end = MIN(start + RUN, to);
        int64_t magnitude = 0, signed_sum = 0;
        int wrong = 0;
        for (int64_t i = start; i < end; i++) {
            const float size = w[i] < 0 ? -w[i] : w[i];
            wrong |= !(size < LARGEST);
            magnitude += on_grid(size);
        }
        if (with_sign)
            for (int64_t i = start; i < end; i++) signed_sum += on_grid(w[i]);
        s->wrong |= wrong;
        s->high[0] += magnitude >> 26, s->low[0] += magnitude & ((1 << 26) - 1);
        s->high[1] += signed_sum >> 26, s->low[1] += signed_sum & ((1 << 26) - 1);
    }
}

// q = clamp(round(w * inv_scale), -1, 1), or 1 where w > mean and else -1.
INLINE void some_levels(
    const float *w, int64_t from, int64_t to, float inv_scale, float mean, int binary, int8_t *q) {
    if (binary) {
        for (int64_t i = from; i < to; i++) q[i] = w[i] > mean ? 1 : -1;
        return;
    }
    for (int64_t i = from; i < to; i++) {
        float scaled = w[i] * inv_scale;
        scaled = scaled > 1.0f ? 1.0f : scaled < -1.0f ? -1.0f : scaled;
        scaled += 12582912.0f;
        int32_t bits;
        memcpy(&bits, &scaled, 4);
        q[i] = (int8_t)bits;
    }
}

// One row of K levels as codes in planes (see ../formats.py); `planes` is 4 for ternary, 8 for binary.
INLINE void pack_row(const int8_t *q, int64_t k, int planes, uint8_t *out) {
    const int width = 256 / planes, bits = 8 / planes;
    int8_t block[256];
    for (int64_t start = 0; start < k; start += 256, out += width) {
        const int8_t *from = q + start;
        if (k - start < 256) {
            memset(block, planes == 4 ? 0 : -1, sizeof block);
            memcpy(block, from, (size_t)(k - start));
            from = block;
        }
        memset(out, 0, (size_t)width);
        for (int p = 0; p < planes; p++)
            for (int j = 0; j < width; j++) {
                const int8_t level = from[p * width + j];
                out[j] |= (uint8_t)((planes == 4 ? level + 1 : level > 0) << (p * bits));
            }
    }
}

INLINE void some_rows(const int8_t *q, int64_t k, int planes, int64_t from, int64_t to, uint8_t *out) {
    const int64_t row_bytes = (k + 255) / 256 * (256 / planes);
    for (int64_t i = from; i < to; i++) {
        if (planes == 4) pack_row(q + i * k, k, 4, out + i * row_bytes);
        else pack_row(q + i * k, k, 8, out + i * row_bytes);
    }
}

#define FOR_ISA(NAME, TARGET)                                                                                          \
    TARGET static void sums_##NAME(const float *w, int64_t from, int64_t to, int with_sign, sums *s) {                 \
        some_sums(w, from, to, with_sign, s);                                                                          \
    }                                                                                                                  \
    TARGET static void levels_##NAME(                                                                                  \
        const float *w, int64_t from, int64_t to, float inv_scale, float mean, int binary, int8_t *q) {                \
        some_levels(w, from, to, inv_scale, mean, binary, q);                                                          \
    }                                                                                                                  \
    TARGET static void pack_##NAME(const int8_t *q, int64_t k, int planes, int64_t from, int64_t to, uint8_t *out) {   \
        some_rows(q, k, planes, from, to, out);                                                                        \
    }
FOR_ISA(portable, )
#if defined(__x86_64__)
FOR_ISA(avx2, TARGET_AVX2)
FOR_ISA(avx512, TARGET_AVX512)
#endif

int bitnet_weight_sums(const float *w, int64_t count, int with_sign, double *out, int threads, int isa) {
    int64_t total[4] = {0};
    int wrong = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(+ : total)                \
    reduction(| : wrong)
    for (int part = 0; part < threads; part++) {
        sums s = {{0}, {0}, 0};
        CALL_FOR_ISA(sums, w, count * part / threads, count * (part + 1) / threads, with_sign, &s);
        total[0] += s.high[0], total[1] += s.low[0], total[2] += s.high[1], total[3] += s.low[1];
        wrong |= s.wrong;
    }
    for (int i = 0; i < 4; i++) out[i] = (double)total[i];
    (void)isa;
    return wrong;
}

void bitnet_weight_levels(
    const float *w, int64_t count, float inv_scale, float mean, int binary, int8_t *q, int threads, int isa) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        CALL_FOR_ISA(levels, w, count * part / threads, count * (part + 1) / threads, inv_scale, mean, binary, q);
    (void)isa;
}

void bitnet_pack_levels(const int8_t *q, int64_t n, int64_t k, int planes, uint8_t *out, int threads, int isa) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        CALL_FOR_ISA(pack, q, k, planes, n * part / threads, n * (part + 1) / threads, out);
    (void)isa;
}
