// Without arguments: exit with the best instruction set. Else: cases from the first file, int32 results to the second.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "api.h"

int main(int argc, char **argv) {
    if (argc < 3) return bitnet_best_isa();
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    int64_t h[6];  // M, N, K, bytes of a row, planes, instruction set
    while (in && out && fread(h, 8, 6, in) == 6) {
        int8_t *x = malloc(h[0] * h[2]);
        uint8_t *w = malloc(h[1] * h[3]);
        int32_t *y = malloc(h[0] * h[1] * 4);
        if (fread(x, 1, h[0] * h[2], in) + fread(w, 1, h[1] * h[3], in) != (size_t)(h[0] * h[2] + h[1] * h[3])) return 100;
        const packed_matmul_call call = {x, h[2], h[0], h[2], w, h[3], h[1], h[4], NULL, NULL, NULL, 0, y, 1, h[5]};
        if (bitnet_packed_matmul(&call)) return 101;
        fwrite(y, 4, h[0] * h[1], out);
        free(x), free(w), free(y);
    }
    return in && out && !fclose(out) ? 0 : 102;
}
