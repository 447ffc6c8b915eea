// The arguments of attention.c, for decode.c too.
#pragma once
#include "common.h"

typedef struct {
    const float *q;  // (M, H, K)
    int64_t q_stride, m, heads, kv_heads, head_dim;
    const float *keys, *values;  // token 0 of sequence 0, head 0
    int64_t sequence_stride, head_stride, token_stride;
    const int64_t *first;  // (M): the first token that each sequence sees, or null for token 0
    int64_t tokens;
    float *out;  // (M, H * K)
} attention_args;

void bitnet_attend_heads(const attention_args *a, int64_t from, int64_t to, float *p, int isa);
