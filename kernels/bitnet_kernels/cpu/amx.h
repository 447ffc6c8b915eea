// Tile products (AMX): 16 rows of codes x 64 inputs times 64 inputs x 16 tokens -> 16 x 16 int32, unsigned x signed.
//
// Weight tiles need no shuffle: 64 packed bytes of a row are, plane by plane, 64 consecutive codes, so a group of 16 rows
// unpacks into `planes` tiles by shift and mask alone. They stay in the cache; an unpacked matrix never exists.
#pragma once
#include "common.h"

#if defined(__x86_64__)

TARGET_AMX static void amx_begin(void) {
    struct { uint8_t palette, start_row, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

TARGET_AMX static void amx_end(void) { _tile_release(); }

// 16 tokens x 64 inputs of arranged activations -> the tile [input / 4][token][input % 4]. Tokens past `tokens` are 0.
TARGET_AMX static void amx_token_tile(const int8_t *x, int64_t stride, int tokens, int8_t *tile) {
    const __m512i rows = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)(stride / 4)));
    const __mmask16 keep = (__mmask16)((1u << tokens) - 1);
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(tile + i * 64, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), keep, rows, x + i * 4, 4));
}

// raw: two tiles of 16 rows x 16 tokens -> out[t * STRIP + r], as dot.h leaves its sums.
TARGET_AMX static void amx_turn(const int32_t *raw, int32_t *out) {
    for (int half = 0; half < 2; half++) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(raw + half * 256 + i * 16);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        // Now lane l of a[4 q + c] holds rows 4 q ... 4 q + 3 of token 4 l + c.
        for (int c = 0; c < 4; c++) {
            const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x44), low23 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x44);
            const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xee), high23 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xee);
            int32_t *to = out + half * 16 + c * STRIP;
            _mm512_storeu_si512(to, _mm512_shuffle_i32x4(low01, low23, 0x88));
            _mm512_storeu_si512(to + 4 * STRIP, _mm512_shuffle_i32x4(low01, low23, 0xdd));
            _mm512_storeu_si512(to + 8 * STRIP, _mm512_shuffle_i32x4(high01, high23, 0x88));
            _mm512_storeu_si512(to + 12 * STRIP, _mm512_shuffle_i32x4(high01, high23, 0xdd));
        }
    }
}

// One group of up to 32 rows -> tiles[plane][row / 16][row % 16][64]. Rows of one group lie apart, which no hardware
// prefetcher follows; so each group also fetches its share of the next strip, which adjoins this one.
INLINE TARGET_AMX void amx_unpack(const uint8_t *w, int64_t row_bytes, int64_t g, int rows, const int P, int8_t *tiles) {
    const int bits = 8 / P;
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const __mmask64 keep = row_bytes - g >= 64 ? ~0ull : 0xffffffffull;
    for (int r = 0; r < rows; r++) {
        __m512i packed = _mm512_maskz_loadu_epi8(keep, w + r * row_bytes + g);
        int8_t *to = tiles + r / 16 * 1024 + r % 16 * 64;
        _mm_prefetch((const char *)(w + STRIP * row_bytes + g * STRIP + r * 64), _MM_HINT_T1);
        for (int p = 0; p < P; p++)
            _mm512_store_si512(to + p * 2048, _mm512_and_si512(_mm512_srli_epi16(packed, bits * p), mask));
    }
}

// Up to 16 tokens: each group is unpacked into a buffer that the caches never lose, while the one before is multiplied.
// out[r * TILE + t].
INLINE TARGET_AMX void amx_few_tokens(
    const uint8_t *w, int64_t row_bytes, int rows, const int P, const int8_t *x_tiles, int32_t *out) {
    _Alignas(64) int8_t buffer[2][8 * 2048];
    if (rows < STRIP) memset(buffer, 0, sizeof buffer);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t g = 0, i = 0; g < row_bytes; g += 64, i ^= 1) {
        amx_unpack(w, row_bytes, g, rows, P, buffer[i]);
        for (int p = 0; p < P; p++, x_tiles += 1024) {
            _tile_loadd(6, x_tiles, 64);
            _tile_loadd(4, buffer[i] + p * 2048, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(5, buffer[i] + p * 2048 + 1024, 64);
            _tile_dpbusd(1, 5, 6);
        }
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
}

// 32 tokens at a time from a strip that is unpacked whole; steps = tiles along K. out[r * TILE + t], then 16 tokens more.
TARGET_AMX static void amx_pair(const int8_t *w_tiles, const int8_t *x0, const int8_t *x1, int64_t steps, int32_t *out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++, w_tiles += 2048, x0 += 1024, x1 += 1024) {
        _tile_loadd(4, w_tiles, 64);
        _tile_loadd(6, x0, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(5, w_tiles + 1024, 64);
        _tile_dpbusd(1, 5, 6);
        _tile_loadd(7, x1, 64);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
}

#endif
