/* Every CPU variant against float64: norms, gates, rope, convolution, attention, DeltaNet, routing. */
#include "kernels_fixture.h"

static const int64_t edges[] = {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 257, 1023, 4096};
static const double u = 5.9604644775390625e-8; /* 2^-24 */

static int report(const char *what, const fm_kernels *k, int64_t at, double got, double want, double limit)
{
    if (fabs(got - want) <= limit || (isnan(got) && isnan(want)))
        return 0;
    fprintf(stderr, "%s %s at %" PRId64 ": %.9g, wanted %.9g, bound %.3g\n", k->name, what, at, got, want, limit);
    return 1;
}

static double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

/* n floats one element past an allocation's start, so that no kernel may lean on alignment. */
static float *odd_floats(int64_t n, uint64_t *s)
{
    float *p = malloc((size_t)(n + 1) * sizeof *p);
    for (int64_t i = 0; i <= n; i++)
        p[i] = rand_wide(s);
    return p + 1;
}

static void norms_and_gates(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 1;
    int bad = 0;
    for (int e = 0; e < FM_COUNT(edges); e++) {
        const int64_t n = edges[e];
        float *x = odd_floats(n, &s), *w = odd_floats(n, &s), *y = odd_floats(n, &s);
        double sum = 0;
        for (int64_t c = 0; c < n; c++)
            sum += (double)x[c] * x[c];
        k->rmsnorm(x, w, 1e-6f, y, n);
        for (int64_t c = 0; c < n; c++) {
            const double want = x[c] / sqrt(sum / (double)n + 1e-6f) * w[c];
            bad += report("rmsnorm", k, c, y[c], want, 8 * u * fabs(want) + 1e-44);
        }
        for (int64_t c = 0; c < n; c++)
            x[c] = c % 4 == 0 ? rand_unit(&s) * 120 : x[c];
        k->swiglu(x, w, y, n);
        for (int64_t c = 0; c < n; c++) {
            const double want = x[c] * sigmoid(x[c]) * w[c];
            bad += report("swiglu", k, c, y[c], want, 16 * u * fabs(want) + ldexp(fabs(w[c]), -120));
        }
        float *z = odd_floats(n, &s);
        memcpy(y, z, (size_t)n * sizeof *y);
        k->axpy(-1.7f, x, y, n);
        for (int64_t c = 0; c < n; c++) {
            const double product = (double)-1.7f * x[c];
            bad += report("axpy", k, c, y[c], z[c] + product, 2 * u * (fabs(z[c]) + fabs(product)));
        }
        const int64_t half = n;
        float *r = odd_floats(2 * half, &s), *before = odd_floats(2 * half, &s);
        memcpy(before, r, (size_t)(2 * half) * sizeof *r);
        for (int64_t c = 0; c < half; c++) {
            w[c] = cosf((float)c);
            y[c] = sinf((float)c);
        }
        k->rope(r, w, y, 2 * half);
        for (int64_t c = 0; c < half; c++) {
            const double lo = before[c], hi = before[c + half], limit = 4 * u * (fabs(lo) + fabs(hi));
            bad += report("rope lo", k, c, r[c], lo * w[c] - hi * y[c], limit);
            bad += report("rope hi", k, c, r[c + half], hi * w[c] + lo * y[c], limit);
        }
        free(x - 1), free(w - 1), free(y - 1), free(z - 1), free(r - 1), free(before - 1);
    }
    CHECK_INT(bad, 0);
}

static void odd_gates(const fm_kernels *k, bool fast)
{
    (void)fast;
    const float gate[] = {0, -0.0f, INFINITY, -INFINITY, NAN, 88, -88, 200, -200, 1e-40f, -1e-40f, 3e38f, -3e38f};
    float up[FM_COUNT(gate)], y[FM_COUNT(gate)];
    for (int i = 0; i < FM_COUNT(gate); i++)
        up[i] = 2;
    k->swiglu(gate, up, y, FM_COUNT(gate));
    CHECK(y[0] == 0 && y[1] == 0);
    CHECK(y[2] == INFINITY && y[11] == INFINITY);
    CHECK(isnan(y[4]));
    CHECK(isnan(y[3]) || y[3] == 0); /* the limit is 0; -inf * 0 is NaN where it is computed so */
    CHECK(y[5] == 176 && fabsf(y[6]) < 1e-35f && y[7] == 400 && fabsf(y[8]) < 1e-35f);
    CHECK(fabsf(y[9]) < 1e-37f && fabsf(y[12]) < 1e-35f);
    float zero[33] = {0}, one[33], out[33];
    for (int i = 0; i < 33; i++)
        one[i] = 1;
    k->rmsnorm(zero, one, 1e-6f, out, 33);
    int bad = 0;
    for (int i = 0; i < 33; i++)
        bad += out[i] != 0;
    CHECK_INT(bad, 0);
    zero[20] = NAN;
    k->rmsnorm(zero, one, 1e-6f, out, 33);
    CHECK(isnan(out[0]) && isnan(out[32]));
}

static void convolution(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 2;
    int bad = 0;
    for (int64_t kern = 1; kern <= 5; kern++)
        for (int64_t n = 1; n <= 9; n += 2) {
            const int64_t ch = 83, ldm = 90, ldy = 85, hist = kern - 1;
            float *m = odd_floats(n * ldm, &s), *w = odd_floats(ch * kern, &s), *h = odd_floats((hist + 1) * ch, &s);
            float *out = odd_floats((hist + 1) * ch, &s), *y = odd_floats(n * ldy, &s);
            k->conv_silu(m, ldm, w, kern, h, out, y, ldy, n, ch, 0, 41);
            k->conv_silu(m, ldm, w, kern, h, out, y, ldy, n, ch, 41, ch);
            for (int64_t c = 0; c < ch; c++) {
                for (int64_t t = 0; t < n; t++) {
                    double sum = 0, size = 0;
                    for (int64_t j = 0; j < kern; j++) {
                        const int64_t at = t - hist + j;
                        const double v = at < 0 ? h[(at + hist) * ch + c] : m[at * ldm + c];
                        sum += w[c * kern + j] * v;
                        size += fabs(w[c * kern + j] * v);
                    }
                    bad += report("conv", k, c, y[t * ldy + c], sum * sigmoid(sum), 32 * u * size + ldexp(1, -120));
                }
                for (int64_t j = 0; j < hist; j++) {
                    const int64_t at = n - hist + j;
                    bad += out[j * ch + c] != (at < 0 ? h[(at + hist) * ch + c] : m[at * ldm + c]);
                }
            }
            free(m - 1), free(w - 1), free(h - 1), free(out - 1), free(y - 1);
        }
    CHECK_INT(bad, 0);
}

static void attend_exact(const fm_attn_args *a, int64_t row, int64_t h, const float *K, const float *V, int64_t n_pos,
                         double *y)
{
    const int64_t hd = a->head_dim, at = row * a->ld_q + h * a->ld_q_head;
    double *s = malloc((size_t)n_pos * sizeof *s), top = -INFINITY, total = 0;
    for (int64_t t = 0; t < n_pos; t++) {
        s[t] = 0;
        for (int64_t d = 0; d < hd; d++)
            s[t] += (double)a->q[at + d] * K[t * hd + d];
        s[t] *= a->scale;
        top = fmax(top, s[t]);
    }
    for (int64_t t = 0; t < n_pos; t++)
        total += s[t] = exp(s[t] - top);
    for (int64_t d = 0; d < hd; d++) {
        y[d] = 0;
        for (int64_t t = 0; t < n_pos; t++)
            y[d] += s[t] / total * V[t * hd + d];
        if (a->gate)
            y[d] *= sigmoid(a->gate[at + d]);
    }
    free(s);
}

/* The kernel's own rounding apart from the format's: the oracle gets K and V as stored. */
static void round_kv(const fm_kernels *k, fm_quant format, float *x, int64_t n, void *stored)
{
    const fm_quant_row row = {.codes = stored};
    k->kv_store(format, x, n, stored);
    fm_quant_get(format)->decode_ref(&row, n, x);
}

static void check_attention(const fm_kernels *k, fm_quant format, int64_t nh, int64_t nkv, int64_t hd, int64_t n,
                            int64_t n_before, bool gate, uint64_t *s)
{
    const int64_t total = n + n_before, ldq = nh * 2 * hd + 3, ldy = nh * hd + 1, per = nh / nkv;
    const int64_t query = fm_attn_part_floats(hd), n_parts = (total + FM_ATTN_PART - 1) / FM_ATTN_PART;
    float *q = odd_floats(n * ldq, s), *K = odd_floats(total * hd, s), *V = odd_floats(total * hd, s);
    float *y1 = odd_floats(n * ldy, s), *y2 = odd_floats(n * ldy, s), *y3 = odd_floats(n * ldy, s);
    float *scratch = malloc((size_t)(FM_ATTN_PASS * query) * sizeof *scratch);
    float *parts = malloc((size_t)(n_parts * n * per * query) * sizeof *parts);
    const size_t bytes = (size_t)(total * hd * fm_quant_get(format)->bits / 8);
    uint8_t *k_odd = malloc(bytes + 1), *v_odd = malloc(bytes + 1);
    double *want = malloc((size_t)hd * sizeof *want), top = 0;
    for (int64_t i = 0; i < total * hd; i++) {
        K[i] = rand_unit(s);
        top = fmax(top, fabs(V[i]));
    }
    for (int64_t i = 0; i < n * ldq; i++)
        q[i] = rand_unit(s) * 2;
    round_kv(k, format, K, total * hd, k_odd + 1);
    round_kv(k, format, V, total * hd, v_odd + 1);
    const fm_kv_head kv = {k_odd + 1, v_odd + 1, format};
    fm_attn_args a = {.n_heads = nh, .n_kv_heads = nkv, .head_dim = hd, .scale = (float)(1 / sqrt((double)hd)), .q = q,
                      .gate = gate ? q + hd : NULL, .ld_q = ldq, .ld_q_head = 2 * hd, .y = y1, .ld_y = ldy};
    int bad = 0;
    for (int64_t g = 0; g < nkv; g++) { /* every KV head reads the same K, V here */
        k->attend_rows(&a, 0, n, g, &kv, n_before, scratch);
        a.y = y2;
        for (int64_t r = 0; r < n; r++)
            k->attend_rows(&a, r, r + 1, g, &kv, n_before, scratch);
        a.y = y3;
        for (int64_t p = n_parts - 1; p >= 0; p--) /* in any order */
            k->attend_part(&a, 0, n, g, &kv, n_before, p, parts + p * n * per * query);
        k->attend_merge(&a, 0, n, g, n_before, parts, n * per * query);
        a.y = y1;
        for (int64_t r = 0; r < n; r++)
            for (int64_t h = g * per; h < (g + 1) * per; h++) {
                attend_exact(&a, r, h, K, V, n_before + r + 1, want);
                const float *y = y1 + r * ldy + h * hd;
                CHECK(memcmp(y, y2 + r * ldy + h * hd, (size_t)hd * sizeof *y) == 0);
                CHECK(memcmp(y, y3 + r * ldy + h * hd, (size_t)hd * sizeof *y) == 0);
                for (int64_t d = 0; d < hd; d++)
                    bad += report("attend", k, d, y[d], want[d], ldexp(top, -18));
            }
    }
    CHECK_INT(bad, 0);
    free(want), free(scratch), free(parts), free(k_odd), free(v_odd);
    free(q - 1), free(K - 1), free(V - 1), free(y1 - 1), free(y2 - 1), free(y3 - 1);
}

/* What f16 does not hold becomes infinity, and the output is no number: the forward refuses it. */
static void attend_overflow(const fm_kernels *k)
{
    enum { HD = 40, N = 70 };
    static float x[N * HD], q[HD], y[HD], scratch[FM_ATTN_PASS * 80];
    static uint16_t K[N * HD], V[N * HD];
    for (int i = 0; i < N * HD; i++)
        x[i] = 1;
    for (int d = 0; d < HD; d++)
        q[d] = 1;
    k->kv_store(FM_QUANT_F16, x, N * HD, V);
    x[7 * HD + 3] = 65520;
    k->kv_store(FM_QUANT_F16, x, N * HD, K);
    const fm_kv_head kv = {K, V, FM_QUANT_F16};
    const fm_attn_args a = {.n_heads = 1, .n_kv_heads = 1, .head_dim = HD, .scale = 1, .q = q, .ld_q = HD, .ld_q_head = HD,
                            .y = y, .ld_y = HD};
    k->attend_rows(&a, 0, 1, 0, &kv, N - 1, scratch);
    for (int d = 0; d < HD; d++)
        CHECK(!isfinite(y[d]));
}

/* Infinities in rows that a query does not see leave it alone, whoever else is in the call. */
static void attend_unseen(const fm_kernels *k, fm_quant format)
{
    enum { HD = 64, N = 40, BAD = 23 };
    static float x[N * HD], q[N * HD], y[N * HD], alone[N * HD], scratch[FM_ATTN_PASS * 80];
    static uint32_t K[N * HD], V[N * HD];
    for (int i = 0; i < N * HD; i++)
        x[i] = q[i] = (float)(i % 7 - 3) / 8;
    k->kv_store(format, x, N * HD, K);
    x[BAD * HD + 5] = INFINITY;
    k->kv_store(format, x, N * HD, V);
    const fm_kv_head kv = {K, V, format};
    fm_attn_args a = {.n_heads = 1, .n_kv_heads = 1, .head_dim = HD, .scale = 1, .q = q, .ld_q = HD, .ld_q_head = HD,
                      .y = y, .ld_y = HD};
    k->attend_rows(&a, 0, N, 0, &kv, 0, scratch);
    a.y = alone;
    for (int64_t r = 0; r < N; r++)
        k->attend_rows(&a, r, r + 1, 0, &kv, 0, scratch);
    for (int i = 0; i < N * HD; i++) {
        CHECK(isfinite(y[i]) == (i / HD < BAD || i % HD != 5));
        CHECK(i / HD >= BAD || y[i] == alone[i]);
    }
}

/* What is no number in one row of K or V, of whole tiles and behind them, is none in the output; huge and subnormal numbers
 * are none of it. `of` 8 queries: those of one row may take a way of their own. */
static void attend_odd_numbers(const fm_kernels *k, fm_quant format, int64_t of)
{
    enum { HD = 64, N = 150 };
    static const int64_t rows[] = {0, 15, 16, 31, 32, 63, 64, 127, 128, 149};
    static float x[N * HD], q[8 * HD], y[8 * HD], scratch[FM_ATTN_PASS * 80];
    static uint32_t K[N * HD], V[N * HD];
    const fm_kv_head kv = {K, V, format};
    const fm_attn_args a = {.n_heads = of, .n_kv_heads = 1, .head_dim = HD, .scale = 1, .q = q, .ld_q = 8 * HD,
                            .ld_q_head = HD, .y = y, .ld_y = 8 * HD};
    for (int i = 0; i < 8 * HD; i++)
        q[i] = (float)(i % 5 - 2) / 4;
    for (int i = 0; i < N * HD; i++)
        x[i] = (float)(i % 7 - 3) / 8;
    k->kv_store(format, x, N * HD, K);
    for (int bad = 0; bad < 2; bad++)
        for (int i = 0; i < FM_COUNT(rows); i++) {
            x[rows[i] * HD + 21] = bad ? INFINITY : NAN;
            k->kv_store(format, x, N * HD, V);
            x[rows[i] * HD + 21] = 0;
            k->attend_rows(&a, 0, 1, 0, &kv, N - 1, scratch);
            for (int64_t d = 0; d < of * HD; d++)
                CHECK(isfinite(y[d]) == (d % HD != 21));
        }
    k->kv_store(format, x, N * HD, V);
    for (int i = 0; i < FM_COUNT(rows); i++) {
        x[rows[i] * HD + 21] = NAN;
        k->kv_store(format, x, N * HD, K);
        x[rows[i] * HD + 21] = 0;
        k->attend_rows(&a, 0, 1, 0, &kv, N - 1, scratch);
        for (int64_t d = 0; d < of * HD; d++)
            CHECK(!isfinite(y[d]));
    }
    const float scales[] = {0, 0x1p-24f, 0x1p-20f, 0x1p-14f, 60000};
    float k_back[N * HD], v_back[N * HD];
    double want[HD];
    int wrong = 0;
    for (int i = 0; i < N * HD; i++)
        x[i] = (float)(i % 11 - 5) / 16;
    round_kv(k, format, x, N * HD, K);
    memcpy(k_back, x, sizeof x);
    for (int i = 0; i < FM_COUNT(scales); i++) {
        for (int d = 0; d < N * HD; d++)
            v_back[d] = scales[i] * (float)(d % 9 - 4) / 4;
        round_kv(k, format, v_back, N * HD, V);
        k->attend_rows(&a, 0, 1, 0, &kv, N - 1, scratch);
        for (int64_t h = 0; h < of; h++) {
            attend_exact(&a, 0, h, k_back, v_back, N, want);
            for (int64_t d = 0; d < HD; d++)
                wrong += report("attend odd", k, d, y[h * HD + d], want[d], ldexp(scales[i] * 1.01, -18));
        }
    }
    CHECK_INT(wrong, 0);
}

static const fm_quant kv_formats[] = {FM_QUANT_F32, FM_QUANT_F16, FM_QUANT_BF16};

static void attention(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 3;
    attend_overflow(k);
    for (int f = 0; f < FM_COUNT(kv_formats); f++) {
        const fm_quant q = kv_formats[f];
        attend_unseen(k, q);
        attend_odd_numbers(k, q, 8);
        attend_odd_numbers(k, q, 3);
        check_attention(k, q, 1, 1, 8, 1, 0, false, &s);
        check_attention(k, q, 4, 2, 24, 5, 61, true, &s);
        check_attention(k, q, 8, 1, 64, 67, 3, true, &s);
        check_attention(k, q, 3, 1, 40, 1, 129, false, &s);
        check_attention(k, q, 16, 2, 256, 3, 190, true, &s);
        check_attention(k, q, 8, 1, 128, 19, FM_ATTN_PART - 9, true, &s);
        check_attention(k, q, 3, 1, 192, 40, 25, false, &s);
        check_attention(k, q, 5, 1, 33, 30, 0, true, &s);
        check_attention(k, q, 2, 1, 16, 40, FM_ATTN_PART - 20, true, &s); /* rows on both sides of a part's end */
        check_attention(k, q, 3, 1, 300, 2, 2 * FM_ATTN_PART + 63, false, &s);
        check_attention(k, q, 8, 1, 64, 34, 0, false, &s);  /* 1 .. 34 positions */
        check_attention(k, q, 8, 1, 256, 3, FM_ATTN_PART - 2, false, &s);
        check_attention(k, q, 8, 1, 192, 1, 2 * FM_ATTN_PART - 1, true, &s);
        check_attention(k, q, 7, 1, 64, 3, FM_ATTN_PART + 62, true, &s);
        check_attention(k, q, 1, 1, 128, 2, 255, false, &s);
        check_attention(k, q, 130, 1, 17, 2, FM_ATTN_PART, true, &s); /* more queries in a row than in a pass */
    }
}

/* Every variant writes the bits of the reference codec: ties, overflow, subnormals, NaN; and no byte too many. */
static void kv_storing(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 9;
    enum { N = 6007 };
    static float x[N];
    static uint8_t got[4 * N + 1], want[4 * N + 1];
    for (int64_t i = 0; i < N; i++) {
        const uint32_t r = (uint32_t)test_rand(&s), bits = i % 3 == 0 ? r : i % 3 == 1 ? r & 0xfffff000u : r & 0xffff8000u;
        memcpy(&x[i], &bits, 4);
    }
    for (int f = 0; f < FM_COUNT(kv_formats); f++)
        for (int64_t n = 1; n <= N; n = n < 70 ? n + 1 : n + 5937) {
            memset(got, 0x5a, sizeof got);
            memset(want, 0x5a, sizeof want);
            fm_quant_get(kv_formats[f])->encode_ref(x, n, 0, FM_QUANT_F32, want + 1, NULL, NULL);
            k->kv_store(kv_formats[f], x, n, got + 1);
            CHECK(memcmp(got, want, sizeof got) == 0);
        }
}

static void delta_exact(const fm_delta_args *a, int64_t h, int64_t n, const float *S_in, double *S, double *y)
{
    const int64_t dk = a->dk, dv = a->dv, kh = h / (a->n_v_heads / a->n_k_heads);
    double *d = malloc((size_t)dv * sizeof *d);
    for (int64_t i = 0; i < dk * dv; i++)
        S[i] = S_in[i];
    for (int64_t t = 0; t < n; t++) {
        const float *q = a->qkv + t * a->ld_qkv + kh * dk, *k = q + a->n_k_heads * dk;
        const float *v = a->qkv + t * a->ld_qkv + 2 * a->n_k_heads * dk + h * dv;
        double qq = 1e-6, kk = 1e-6, norm = 0;
        for (int64_t i = 0; i < dk; i++) {
            qq += (double)q[i] * q[i];
            kk += (double)k[i] * k[i];
        }
        const double x = (double)a->a[t * a->ld_ab + h] + a->dt_bias[h];
        const double alpha = exp(-exp(a->A_log[h]) * (fmax(x, 0) + log1p(exp(-fabs(x)))));
        const double beta = sigmoid(a->b[t * a->ld_ab + h]);
        for (int64_t j = 0; j < dv; j++) {
            double sk = 0;
            for (int64_t i = 0; i < dk; i++)
                sk += k[i] / sqrt(kk) * (S[i * dv + j] *= alpha);
            d[j] = beta * (v[j] - sk);
        }
        for (int64_t j = 0; j < dv; j++) {
            double o = 0;
            for (int64_t i = 0; i < dk; i++)
                o += q[i] / sqrt(qq * (double)dk) * (S[i * dv + j] += k[i] / sqrt(kk) * d[j]);
            y[t * dv + j] = o;
            norm += o * o;
        }
        for (int64_t j = 0; j < dv; j++) {
            const double z = a->z[t * a->ld_z + h * dv + j];
            y[t * dv + j] *= a->norm_w[j] / sqrt(norm / (double)dv + a->eps) * z * sigmoid(z);
        }
    }
    free(d);
}

static void check_delta(const fm_kernels *k, int64_t hk, int64_t hv, int64_t dk, int64_t dv, int64_t n, uint64_t *s)
{
    const int64_t ldq = 2 * hk * dk + hv * dv + 5, ldz = hv * dv + 2, ldab = hv + 1, ldy = hv * dv + 3;
    float *qkv = odd_floats(n * ldq, s), *z = odd_floats(n * ldz, s), *ab = odd_floats(2 * n * ldab, s);
    float *A = odd_floats(hv, s), *dt = odd_floats(hv, s), *w = odd_floats(dv, s), *y = odd_floats(n * ldy, s);
    float *S0 = odd_floats(dk * dv, s), *S1 = odd_floats(dk * dv, s), *S2 = odd_floats(dk * dv, s);
    float *S3 = odd_floats(dk * dv, s), *y2 = odd_floats(n * ldy, s);
    for (int64_t i = 0; i < hv; i++)
        A[i] = rand_unit(s);
    fm_delta_args a = {.n_k_heads = hk, .n_v_heads = hv, .dk = dk, .dv = dv, .qkv = qkv, .z = z, .a = ab,
                       .b = ab + n * ldab, .A_log = A, .dt_bias = dt, .norm_w = w, .eps = 1e-6f, .y = y,
                       .ld_qkv = ldq, .ld_z = ldz, .ld_ab = ldab, .ld_y = ldy};
    float *scratch = malloc((size_t)k->delta_scratch(&a, n) * sizeof *scratch);
    double *S = malloc((size_t)(dk * dv) * sizeof *S), *want = malloc((size_t)(n * dv) * sizeof *want);
    int bad = 0;
    for (int64_t h = 0; h < hv; h++) {
        double top_s = 0, top_y = 0;
        k->delta(&a, h, n, S0, S1, scratch);
        delta_exact(&a, h, n, S0, S, want);
        for (int64_t i = 0; i < dk * dv; i++)
            top_s = fmax(top_s, fmax(fabs(S[i]), fabs(S0[i])));
        for (int64_t i = 0; i < n * dv; i++)
            top_y = fmax(top_y, fabs(want[i]));
        for (int64_t i = 0; i < dk * dv; i++)
            bad += report("delta state", k, i, S1[i], S[i], 2e-6 * top_s);
        for (int64_t i = 0; i < n * dv; i++) {
            const float got = y[i / dv * ldy + h * dv + i % dv];
            bad += report("delta output", k, i, got, want[i], 1e-5 * top_y);
        }
        /* cut into calls of 1, 2, 3, ... rows: the same bits */
        const float *from = S0;
        for (int64_t t = 0, m = 1; t < n; t += m, m++) {
            fm_delta_args b = a;
            float *to = from == S2 ? S3 : S2;
            m = t + m > n ? n - t : m;
            b.qkv += t * ldq, b.z += t * ldz, b.a += t * ldab, b.b += t * ldab;
            b.y = y2 + t * ldy;
            k->delta(&b, h, m, from, to, scratch);
            from = to;
        }
        CHECK(memcmp(from, S1, (size_t)(dk * dv) * sizeof *S1) == 0);
        for (int64_t t = 0; t < n; t++)
            CHECK(memcmp(y + t * ldy + h * dv, y2 + t * ldy + h * dv, (size_t)dv * sizeof *y) == 0);
    }
    CHECK_INT(bad, 0);
    free(scratch), free(S), free(want);
    free(qkv - 1), free(z - 1), free(ab - 1), free(A - 1), free(dt - 1), free(w - 1), free(y - 1), free(y2 - 1);
    free(S0 - 1), free(S1 - 1), free(S2 - 1), free(S3 - 1);
}

static void delta_net(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 4;
    check_delta(k, 2, 4, 128, 128, 70, &s);
    check_delta(k, 1, 3, 24, 40, 9, &s);
    check_delta(k, 1, 1, 17, 33, 140, &s);
    check_delta(k, 1, 2, 1, 1, 3, &s);
}

static void check_route(const fm_kernels *k, const fm_route_args *a, const float *logits)
{
    static fm_kernels ref;
    if (ref.name == NULL)
        fm_kernels_variant("ref", &ref);
    int32_t ids[64], want[64];
    float w[64], ww[64], *scratch = malloc((size_t)a->n_experts * sizeof *scratch);
    k->route(a, logits, ids, w, scratch);
    ref.route(a, logits, want, ww, scratch);
    for (int64_t j = 0; j < a->k; j++) {
        CHECK_INT(ids[j], want[j]);
        CHECK(report("route", k, j, w[j], ww[j], 4 * u * fabs(ww[j])) == 0);
    }
    free(scratch);
}

static void routing(const fm_kernels *k, bool fast)
{
    (void)fast;
    uint64_t s = 5;
    for (int i = 0; i < 300; i++) {
        float logits[3000], bias[3000];
        fm_route_args a = {.n_experts = 1 + (int64_t)(test_rand(&s) % 512), .sigmoid = i & 1, .renorm = i >> 1 & 1,
                           .eps = i % 3 ? 0 : 1e-20f, .scale = 1.5f, .bias = i % 5 == 0 ? bias : NULL};
        if (i % 4 == 0)
            a.n_experts = i % 16 == 4 ? 3000 : 512;
        if (i % 8 == 0) {
            a.n_group = 8;
            a.topk_group = 3;
        }
        a.k = i % 7 == 0 && a.n_experts <= 64 ? a.n_experts : 1 + (int64_t)(test_rand(&s) % 10);
        a.k = a.k < a.n_experts ? a.k : a.n_experts;
        for (int64_t e = 0; e < a.n_experts; e++) {
            logits[e] = rand_wide(&s);
            bias[e] = rand_unit(&s);
            if (i % 6 == 0) /* many ties, and both zeros */
                logits[e] = roundf(logits[e]) * (test_rand(&s) % 2 ? 1 : -1);
        }
        check_route(k, &a, logits);
        if (i % 10 == 0) { /* non-finite scores keep ids in bounds and distinct */
            for (int64_t e = 0; e < a.n_experts; e += 2)
                logits[e] = NAN;
            int32_t ids[64];
            float w[64], scratch[3000];
            k->route(&a, logits, ids, w, scratch);
            for (int64_t j = 0; j < a.k; j++) {
                CHECK(ids[j] >= 0 && ids[j] < a.n_experts);
                for (int64_t o = 0; o < j; o++)
                    CHECK(ids[o] != ids[j]);
            }
        }
    }
}

#define ALL(test)                                                                                  \
    static void test##_all(void) { test_variants(test); }
ALL(norms_and_gates)
ALL(odd_gates)
ALL(convolution)
ALL(attention)
ALL(kv_storing)
ALL(delta_net)
ALL(routing)

int main(int argc, char **argv)
{
    test_n_names = argc - 1;
    test_names = argv + 1;
    RUN(norms_and_gates_all);
    RUN(odd_gates_all);
    RUN(convolution_all);
    RUN(attention_all);
    RUN(kv_storing_all);
    RUN(delta_net_all);
    RUN(routing_all);
    TEST_EXIT();
}
