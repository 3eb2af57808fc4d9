/* What the machine can do at most, measured: memory read, and register loops of FMA, int8 dot products and int8
 * tiles (GFLOP/s, 2 per multiply-add; 0: the CPU has none). Loops over registers: nothing else is faster here. */
#ifndef FM_BENCH_ROOF_H
#define FM_BENCH_ROOF_H

#include <stdint.h>
#include <string.h>

#include "base/clock.h"
#include "base/threads.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/x86.h"
#endif

enum { READ_TASK = 4 << 20, READ_STREAMS = 4, ROUNDS = 1 << 22, CHAINS = 12 };

typedef struct reader {
    const uint8_t *p;
    int64_t bytes;
    volatile uint64_t sink;
} reader;

typedef uint64_t u64x4 __attribute__((vector_size(32), aligned(8), may_alias));

#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx2,fma")))
#endif
static uint64_t read_all(const uint8_t *p, int64_t bytes)
{
    const int64_t part = bytes / READ_STREAMS; /* one stream alone waits at the end of every page */
    u64x4 s[8] = {{0}};
    for (int64_t i = 0; i + 256 <= part; i += 256)
        for (int k = 0; k < READ_STREAMS; k++)
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                s[j] |= *(const u64x4 *)(p + k * part + i + 32 * j);
    for (int j = 1; j < 8; j++)
        s[0] |= s[j];
    return s[0][0] | s[0][1] | s[0][2] | s[0][3];
}
static void read_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    reader *r = ctx;
    const int64_t at = task * READ_TASK, left = r->bytes - at;
    r->sink = read_all(r->p + at, left < READ_TASK ? left : READ_TASK);
}

/* Seconds in which all threads of the pool together read bytes at p once. */
static inline double roof_read_seconds(fm_pool *pool, const void *p, int64_t bytes)
{
    reader r = {p, bytes, 0};
    const int64_t start = fm_clock_ns();
    fm_parallel_for(pool, (bytes + READ_TASK - 1) / READ_TASK, read_task, &r);
    return (double)(fm_clock_ns() - start) * 1e-9;
}

/* Best of three rounds of one task per thread; each task does `flops` operations. */
static inline double measure(fm_pool *pool, fm_task_fn *fn, double flops)
{
    double best = 0;
    for (int i = 0; i < 3; i++) {
        const int64_t start = fm_clock_ns();
        fm_parallel_for(pool, fm_pool_threads(pool), fn, NULL);
        const double rate = flops * fm_pool_threads(pool) / (double)(fm_clock_ns() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

#if defined(__x86_64__)

#define LOOP(name, isa, type, zero, body)                                                          \
    __attribute__((target(isa))) static void name(void *ctx, int64_t task, int worker)                                          \
    {                                                                                              \
        (void)ctx, (void)task, (void)worker;                                                       \
        type c[CHAINS], x = zero;                                                                  \
        for (int i = 0; i < CHAINS; i++)                                                           \
            c[i] = x;                                                                              \
        for (int64_t r = 0; r < ROUNDS; r++) {                                                     \
            _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) c[i] = body;                 \
            __asm__ volatile("" : "+x"(x));                                                        \
        }                                                                                          \
        for (int i = 0; i < CHAINS; i++)                                                           \
            __asm__ volatile("" ::"x"(c[i]));                                                      \
    }
#define VL_ISA "avx512f,avx512bw,avx512vl,avx512vnni"
LOOP(fma_512, "avx512f,avx512vl", __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(c[i], x, x))
LOOP(fma_256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(c[i], x, x))
LOOP(dot_512, VL_ISA, __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(c[i], x, x))
LOOP(dot_256, "avx2", __m256i, _mm256_setzero_si256(),
     _mm256_add_epi32(c[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, c[i]), x)))

static inline double roof_fma(fm_pool *pool)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        return measure(pool, fma_512, 32.0 * CHAINS * ROUNDS);
    return __builtin_cpu_supports("fma") ? measure(pool, fma_256, 16.0 * CHAINS * ROUNDS) : 0;
}

static inline double roof_int8(fm_pool *pool)
{
    if (__builtin_cpu_supports("avx512vnni"))
        return measure(pool, dot_512, 128.0 * CHAINS * ROUNDS);
    return __builtin_cpu_supports("avx2") ? measure(pool, dot_256, 64.0 * CHAINS * ROUNDS) : 0;
}

#if defined(__linux__)
__attribute__((target("amx-tile,amx-int8"))) static void tiles(void *ctx, int64_t task, int worker)
{
    (void)ctx, (void)task, (void)worker;
    _Alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = 16;
    }
    __asm__ volatile("" ::"r"(&c) : "memory"); /* GCC's intrinsic admits to reading 8 bytes only */
    _tile_loadconfig(&c);
    for (int64_t r = 0; r < ROUNDS / 4; r++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_release();
}

static inline double roof_tiles(fm_pool *pool)
{
    if (!fm_x86_has_amx() || syscall(SYS_arch_prctl, 0x1023, 18) != 0)
        return 0;
    return measure(pool, tiles, 32768.0 * ROUNDS);
}
#else
static inline double roof_tiles(fm_pool *pool)
{
    (void)pool;
    return 0;
}
#endif

#else

typedef float f32x4 __attribute__((vector_size(16)));

static void fma_128(void *ctx, int64_t task, int worker)
{
    (void)ctx, (void)task, (void)worker;
    f32x4 c[CHAINS] = {{0}}, x = {0};
    for (int64_t r = 0; r < ROUNDS; r++) {
        for (int i = 0; i < CHAINS; i++)
            c[i] += x * x;
        __asm__ volatile("" : "+w"(x));
    }
    for (int i = 0; i < CHAINS; i++)
        __asm__ volatile("" ::"w"(c[i]));
}

static inline double roof_fma(fm_pool *pool) { return measure(pool, fma_128, 8.0 * CHAINS * ROUNDS); }

static inline double roof_int8(fm_pool *pool)
{
    (void)pool;
    return 0;
}

static inline double roof_tiles(fm_pool *pool)
{
    (void)pool;
    return 0;
}

#endif

#endif
