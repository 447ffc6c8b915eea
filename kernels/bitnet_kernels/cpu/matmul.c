// Packed matrix product: y (M, N) = x (M, K) int8 times the codes of w (N, K), exact in int32, scaled once at the end.
//
// Steps of a call: arrange the activations so that they meet the planes of a packed row in order; give each thread a
// range of rows; take them a strip of 32 at a time, times all tokens; turn code sums into sums of weights (ternary: minus
// the sum of the token, binary: twice, minus the sum); divide by the scales (fp32, one rounding each) or store int32.
#include "amx.h"
#include "common.h"
#include "dot.h"

typedef struct {
    const int8_t *x;
    int64_t x_stride, m, k;
    const uint8_t *w;
    int64_t row_bytes, n;
    int planes;
    const float *x_inv;  // (M) or null: then out is int32
    const float *w_inv;  // one value, or (N) where w_inv_stride is 1
    int64_t w_inv_stride;
    void *out;  // (M, N) contiguous
} product;

// Codes of a row, counted in whole groups.
static int64_t arranged_k(const product *a) { return (a->row_bytes + 63) / 64 * 64 * a->planes; }

// Working memory that a thread keeps from call to call, unless it is large.
typedef struct { void *data; size_t size; } buffer;
static void *reserve(buffer *b, size_t size) {
    if (b->size < size) {
        free(b->data);
        b->data = aligned_alloc(64, (size + 4095) / 4096 * 4096);
        b->size = b->data ? (size + 4095) / 4096 * 4096 : 0;
    }
    return b->data;
}
static void release_if_large(buffer *b) {
    if (b->size > (4 << 20)) {
        free(b->data);
        *b = (buffer){0};
    }
}

// One token -> arranged, zero-padded. Ternary planes are 64 codes wide, so nothing moves; binary planes are 32 wide in a
// block of 32 bytes, and a group holds the planes of two blocks side by side.
static void arrange(const product *a, const int8_t *x, int8_t *to) {
    memset(to, 0, (size_t)arranged_k(a));
    if (a->planes == 4) {
        memcpy(to, x, (size_t)a->k);
        return;
    }
    for (int64_t k = 0; k < a->k; k += 32) {
        int64_t block = k / 256, plane = k % 256 / 32;
        memcpy(to + block / 2 * 512 + plane * 64 + block % 2 * 32, x + k, (size_t)MIN(32, a->k - k));
    }
}

static int32_t sum_of(const int8_t *x, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; i++) sum += x[i];
    return sum;
}

// Code sums (row r, token t at raw[t * STRIP + r]) -> results.
INLINE void epilogue(
    const product *a, const int32_t *raw, int64_t row, int rows, int64_t token, int tokens, const int32_t *x_sum) {
    const int factor = a->planes == 8 ? 2 : 1;
    for (int t = 0; t < tokens; t++, raw += STRIP) {
        const int64_t at = (token + t) * a->n + row;
        const int32_t offset = x_sum[t];
        if (!a->x_inv) {
            int32_t *y = (int32_t *)a->out + at;
            for (int r = 0; r < rows; r++) y[r] = raw[r] * factor - offset;
            continue;
        }
        float *y = (float *)a->out + at;
        const float x_inv = a->x_inv[token + t];
        if (a->w_inv_stride) {
            const float *w_inv = a->w_inv + row;
            for (int r = 0; r < rows; r++) y[r] = (float)(raw[r] * factor - offset) / (x_inv * w_inv[r]);
        } else {
            const float inv = x_inv * *a->w_inv;
            for (int r = 0; r < rows; r++) y[r] = (float)(raw[r] * factor - offset) / inv;
        }
    }
}

INLINE void strips_by_dot(
    const product *a, int isa, const int8_t *x, const int32_t *x_sum, int64_t token, int tokens, int64_t row, int64_t end) {
    int32_t raw[TILE * STRIP];
    const int64_t kx = arranged_k(a);
    for (; row < end; row += STRIP) {
        const int rows = (int)MIN(STRIP, end - row);
        for (int t = 0; t < tokens; t += TILE) {
            const int here = MIN(TILE, tokens - t);
            dot((dot_args){a->w + row * a->row_bytes, a->row_bytes, rows, a->planes, x + t * kx, kx, here, raw}, isa);
            epilogue(a, raw, row, rows, token + t, here, x_sum + t);
        }
    }
}

#if defined(__x86_64__)
TARGET_AVX512 static void strips_avx512(
    const product *a, const int8_t *x, const int32_t *x_sum, int64_t token, int tokens, int64_t row, int64_t end) {
    strips_by_dot(a, AVX512, x, x_sum, token, tokens, row, end);
}

TARGET_AMX static void strips_amx(
    const product *a, const int8_t *x_tiles, const int32_t *x_sum, int64_t token, int tokens, int64_t row, int64_t end,
    int8_t *w_tiles) {
    _Alignas(64) int32_t raw[4 * 256], turned[TILE * STRIP];
    const int64_t steps = arranged_k(a) / 64, groups = steps / a->planes;
    amx_begin();
    for (; row < end; row += STRIP) {
        const int rows = (int)MIN(STRIP, end - row);
        const uint8_t *w = a->w + row * a->row_bytes;
        if (tokens <= TILE) {
            if (a->planes == 4) amx_few_tokens(w, a->row_bytes, rows, 4, x_tiles, raw);
            else amx_few_tokens(w, a->row_bytes, rows, 8, x_tiles, raw);
            amx_turn(raw, turned);
            epilogue(a, turned, row, rows, token, tokens, x_sum);
            continue;
        }
        for (int64_t g = 0; g < groups; g++) {
            if (a->planes == 4) amx_unpack(w, a->row_bytes, g * 64, rows, 4, w_tiles + g * 4 * 2048);
            else amx_unpack(w, a->row_bytes, g * 64, rows, 8, w_tiles + g * 8 * 2048);
        }
        for (int t = 0; t < tokens; t += 2 * TILE) {
            const int8_t *x0 = x_tiles + t / TILE * steps * 1024;
            amx_pair(w_tiles, x0, tokens - t > TILE ? x0 + steps * 1024 : x0, steps, raw);
            for (int u = t; u < MIN(tokens, t + 2 * TILE); u += TILE) {
                amx_turn(raw + (u - t) * 2 * TILE, turned);
                epilogue(a, turned, row, rows, token + u, MIN(TILE, tokens - u), x_sum + u);
            }
        }
    }
    amx_end();
}
#endif

// Rows of one of `parts` equal shares, times at most TILE tokens; arranges them by itself. Returns 1 without memory.
static int share_of_rows(const product *a, const int32_t *known_sum, int part, int parts, int isa) {
    static __thread buffer arranged, tiles;
    const int64_t kx = arranged_k(a), strips = (a->n + STRIP - 1) / STRIP, m = a->m;
    const int64_t row = strips * part / parts * STRIP, end = MIN(strips * (part + 1) / parts * STRIP, a->n);
    int8_t *const xs = reserve(&arranged, (size_t)(m * kx));
    int32_t x_sum[TILE];
    if (!xs) return 1;
    for (int64_t t = 0; t < m; t++) {
        arrange(a, a->x + t * a->x_stride, xs + t * kx);
        x_sum[t] = known_sum ? known_sum[t] : sum_of(a->x + t * a->x_stride, a->k);
    }
#if defined(__x86_64__)
    if (isa >= AMX && m > 1) {
        int8_t *const x_tiles = reserve(&tiles, (size_t)(TILE * kx));
        if (!x_tiles) return 1;
        for (int64_t i = 0; i < kx / 64; i++) amx_token_tile(xs + i * 64, kx, (int)m, x_tiles + i * 1024);
        strips_amx(a, x_tiles, x_sum, 0, (int)m, row, end, NULL);
        return 0;
    }
    if (isa >= AVX512) {
        strips_avx512(a, xs, x_sum, 0, (int)m, row, end);
        return 0;
    }
#endif
    strips_by_dot(a, isa, xs, x_sum, 0, (int)m, row, end);
    return 0;
}

int bitnet_matmul_share(
    const int8_t *x, int64_t m, int64_t k, const uint8_t *w, int64_t row_bytes, int64_t n, int planes, const int32_t *sum,
    const float *x_inv, const float *w_inv, int64_t w_inv_stride, float *out, int part, int parts, int isa) {
    const product a = {x, k, m, k, w, row_bytes, n, planes, x_inv, w_inv, w_inv_stride, out};
    return share_of_rows(&a, sum, part, parts, isa);
}

// Tokens whose arranged activations stay in a second-level cache beside a strip of weights.
static int tokens_per_pass(const product *a) {
    const int64_t fit = (1 << 20) / arranged_k(a) / STRIP * STRIP;
    return (int)(fit < 2 * STRIP ? 2 * STRIP : MIN(fit, 512));
}

int bitnet_packed_matmul(const packed_matmul_call *c) {
    static __thread buffer arranged, tiles, sums, strip;
    const int8_t *const x = c->x;
    const int32_t *const known_sum = c->known_sum;
    const int64_t x_stride = c->x_stride, m = c->m, k = c->k, n = c->n;
    const product a = {x, x_stride, m, k, c->w, c->row_bytes, n, (int)c->planes, c->x_inv, c->w_inv, c->w_inv_stride, c->out};
    const int64_t kx = arranged_k(&a), strips = (n + STRIP - 1) / STRIP;
    const int step = tokens_per_pass(&a), isa = (int)c->isa;
    const int threads = (int)MIN(c->threads, strips);
    int failed = 0;
    if (!m || !n) return 0;
    if (m <= TILE) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
        for (int part = 0; part < threads; part++) failed |= share_of_rows(&a, known_sum, part, threads, isa);
        return failed;
    }
    for (int64_t token = 0; token < m && !failed; token += step) {
        const int tokens = (int)MIN(step, m - token);
        const int amx = isa >= AMX && tokens > 1;
        const int64_t padded = (tokens + TILE - 1) / TILE * TILE;
        int8_t *const xs = reserve(&arranged, (size_t)(tokens * kx));
        int8_t *const x_tiles = amx ? reserve(&tiles, (size_t)(padded * kx)) : xs;
        int32_t *const x_sum = reserve(&sums, (size_t)tokens * sizeof(int32_t));
        if (!xs || !x_tiles || !x_sum) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int t = 0; t < tokens; t++) {
            arrange(&a, x + (token + t) * x_stride, xs + t * kx);
            x_sum[t] = known_sum ? known_sum[token + t] : sum_of(x + (token + t) * x_stride, k);
        }
#if defined(__x86_64__)
        if (amx) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
            for (int64_t i = 0; i < padded / TILE * (kx / 64); i++) {
                const int64_t t = i / (kx / 64) * TILE, at = i % (kx / 64) * 64;
                amx_token_tile(xs + t * kx + at, kx, (int)MIN(TILE, tokens - t), x_tiles + i * 1024);
            }
        }
#endif
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
        for (int part = 0; part < threads; part++) {
            const int64_t row = strips * part / threads * STRIP, end = MIN(strips * (part + 1) / threads * STRIP, n);
#if defined(__x86_64__)
            if (amx) {
                int8_t *w_tiles = tokens > TILE ? reserve(&strip, (size_t)(STRIP * kx)) : NULL;
                if (tokens > TILE && !w_tiles) failed = 1;
                else strips_amx(&a, x_tiles, x_sum, token, tokens, row, end, w_tiles);
                release_if_large(&strip);
            } else if (isa >= AVX512) {
                strips_avx512(&a, xs, x_sum, token, tokens, row, end);
            } else
#endif
                strips_by_dot(&a, isa, xs, x_sum, token, tokens, row, end);
        }
    }
    release_if_large(&arranged);
    release_if_large(&tiles);
    return failed;
}
