// Float32 helpers whose results do not depend on the instruction set: fixed lanes, fused multiply-add only where written.
#pragma once
#include "common.h"
#include <math.h>

typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

// The sum of the lanes, by halves.
INLINE float sum16(vec16 v) {
    union { vec16 whole; vec8 half[2]; } a = {v};
    union { vec8 whole; vec4 half[2]; } b = {a.half[0] + a.half[1]};
    const vec4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

INLINE float power_of_2(int32_t e) {
    const int32_t bits = (e + 127) << 23;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// e^x to within 1 ulp: range reduction by ln 2 in two parts and a polynomial of degree 6, evaluated with fused
// multiply-adds in the order of the vector library that torch links on CPUs, whose results it has to give.
INLINE float exp_u10(float x) {
    const float q = rintf(x * 1.442695040888963407359924681001892137426645954152985934135449406931f);
    float s = __builtin_fmaf(q, -0.693145751953125f, x);
    s = __builtin_fmaf(q, -1.428606765330187045e-06f, s);
    float u = 0.000198527617612853646278381f;
    u = __builtin_fmaf(u, s, 0.00139304355252534151077271f);
    u = __builtin_fmaf(u, s, 0.00833336077630519866943359f);
    u = __builtin_fmaf(u, s, 0.0416664853692054748535156f);
    u = __builtin_fmaf(u, s, 0.166666671633720397949219f);
    u = __builtin_fmaf(u, s, 0.5f);
    u = 1.0f + __builtin_fmaf(s * s, u, s);
    const float bounded = q < -200.0f ? -200.0f : q > 200.0f ? 200.0f : q;
    const int32_t e = (int32_t)bounded, half = e >> 1;
    u = u * power_of_2(half) * power_of_2(e - half);
    u = x < -104.0f ? 0.0f : u;
    u = x > 100.0f ? INFINITY : u;
    return x != x ? x : u;
}
