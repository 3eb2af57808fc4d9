/* Measures the choice of experts of one row: 10 of 512 and 8 of 256 experts, softmax and sigmoid, per CPU variant.
 *   bench_router [--runs N] */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "bench.h"
#include "cpu/kernels.h"

enum { ROWS = 1024, MAX_EXPERTS = 512, MAX_K = 16 };

static float logits[ROWS][MAX_EXPERTS];

static void run(const char *variant, int64_t n_experts, int64_t k, int sigmoid, int runs)
{
    fm_kernels kernels, ref;
    if (fm_kernels_variant(variant, &kernels) != FM_OK || fm_kernels_variant("ref", &ref) != FM_OK)
        exit(1);
    const fm_route_args a = {.n_experts = n_experts, .k = k, .sigmoid = sigmoid, .renorm = 1, .scale = 1};
    int32_t ids[MAX_K], want[MAX_K];
    float weights[MAX_K], scratch[MAX_EXPERTS];
    for (int i = 0; i < ROWS; i++) { /* right before fast */
        kernels.route(&a, logits[i], ids, weights, scratch);
        ref.route(&a, logits[i], want, weights, scratch);
        if (memcmp(ids, want, (size_t)k * sizeof *ids) != 0) {
            fprintf(stderr, "bench_router: %s: wrong ids in row %d\n", variant, i);
            exit(1);
        }
    }
    bench_series us = {.n = 0};
    for (int r = -1; r < runs; r++) {
        const int64_t start = fm_clock_ns();
        for (int i = 0; i < ROWS; i++)
            kernels.route(&a, logits[i], ids, weights, scratch);
        if (r >= 0)
            bench_add(&us, (double)(fm_clock_ns() - start) * 1e-3 / ROWS);
    }
    bench_json_begin("router");
    bench_json_text("variant", variant);
    bench_json_int("experts", n_experts);
    bench_json_int("k", k);
    bench_json_text("score", sigmoid ? "sigmoid" : "softmax");
    bench_json_series("us", &us);
    bench_json_end();
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"runs", required_argument, NULL, 'r'}, {NULL, 0, NULL, 0}};
    int runs = 15;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c != 'r' || (runs = atoi(optarg)) < 1 || runs > BENCH_MAX_RUNS) {
            fprintf(stderr, "bench_router [--runs N]\n");
            return 2;
        }
    }
    uint64_t s = 1;
    for (int i = 0; i < ROWS * MAX_EXPERTS; i++) {
        s = s * UINT64_C(6364136223846793005) + 1442695040888963407u;
        logits[i / MAX_EXPERTS][i % MAX_EXPERTS] = (float)(int32_t)(s >> 32) * 1e-9f;
    }
    for (int i = 0; fm_kernels_name(i) != NULL; i++)
        if (fm_kernels_supported(i))
            for (int sigmoid = 0; sigmoid < 2; sigmoid++) {
                run(fm_kernels_name(i), 512, 10, sigmoid, runs);
                run(fm_kernels_name(i), 256, 8, sigmoid, runs);
            }
    return 0;
}
