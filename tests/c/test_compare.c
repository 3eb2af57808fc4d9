/* FLASHMOE_COMPARE: an honest device passes and keeps its bits; one wrong number in any output of any op is found and
 * named. The device here is the CPU backend with a hand in its vtable. */
#include <math.h>

#include "backend/backend_compare.h"
#include "base/mem.h"
#include "harness.h"

static fm_pool *pool;
static fm_backend *device, *judge, *both;
static fm_backend_vtable liar;
static const fm_backend_vtable *honest;
static float *victim; /* the number that the device gets wrong; NULL: none */

static void lie(void)
{
    if (victim)
        *victim = *victim * 1.01f + 1e-3f;
}

#define LIAR(op, params, args)                                                                     \
    static fm_status liar_##op params                                                              \
    {                                                                                              \
        FM_TRY(honest->op args);                                                                   \
        lie();                                                                                     \
        return FM_OK;                                                                              \
    }
LIAR(embed, (fm_backend * b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy), (b, W, ids, n, y, ldy))
LIAR(rmsnorm, (fm_backend * b, const float *x, int64_t ldx, const float *w, float eps, float *y, int64_t ldy, int64_t n, int64_t n_cols), (b, x, ldx, w, eps, y, ldy, n, n_cols))
LIAR(matmul, (fm_backend * b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items, int n_items), (b, x, ldx, n, items, n_items))
LIAR(clip, (fm_backend * b, float *x, int64_t n, float limit), (b, x, n, limit))
LIAR(rope, (fm_backend * b, const fm_rope_args *a), (b, a))
LIAR(attention, (fm_backend * b, const fm_attention_args *a), (b, a))
LIAR(conv, (fm_backend * b, const fm_conv_args *a), (b, a))
LIAR(delta, (fm_backend * b, const fm_delta_batch *a), (b, a))
LIAR(swiglu, (fm_backend * b, const float *gate, const float *up, float *y, int64_t n), (b, gate, up, y, n))
LIAR(experts, (fm_backend * b, const fm_expert_args *a), (b, a))
LIAR(combine, (fm_backend * b, const fm_combine_args *a), (b, a))
LIAR(add_gated, (fm_backend * b, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols), (b, x, gate, y, n, n_cols))

static bool swap; /* the first two experts of the first row */
static fm_status liar_route(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                            float *weights)
{
    FM_TRY(honest->route(b, a, logits, n, ids, weights));
    lie();
    if (swap) {
        const int32_t first = ids[0];
        ids[0] = ids[1];
        ids[1] = first;
    }
    return FM_OK;
}

static fm_status liar_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row)
{
    FM_TRY(honest->find_nonfinite(b, x, n, n_cols, row));
    *row += victim != NULL;
    return FM_OK;
}

static void open_both(void)
{
    const fm_backend_opts opts = {"cpu", pool, FM_NUMERIC_EXACT};
    REQUIRE(fm_backend_open(&opts, &device) == FM_OK && fm_backend_open(&opts, &judge) == FM_OK);
    honest = device->v;
    liar = *honest;
    liar.name = "liar";
    liar.embed = liar_embed, liar.rmsnorm = liar_rmsnorm, liar.matmul = liar_matmul, liar.clip = liar_clip;
    liar.rope = liar_rope, liar.attention = liar_attention, liar.conv = liar_conv, liar.delta = liar_delta;
    liar.swiglu = liar_swiglu, liar.route = liar_route, liar.experts = liar_experts, liar.combine = liar_combine;
    liar.add_gated = liar_add_gated, liar.find_nonfinite = liar_nonfinite;
    device->v = &liar;
    REQUIRE(fm_backend_compare_open(device, judge, pool, &both) == FM_OK);
}

/* ---- one call of every op, all on these arrays ---------------------------------------------------- */

enum { ROWS = 3, H = 64, W = 32, HD = 8, CAP = 9, EXPERTS = 6, K = 2, KERN = 4, DK = 8, DV = 4 };
enum { N_CH = 2 * DK + 2 * DV, STATE = 2 * DK * DV };

typedef struct arrays {
    float x[ROWS * H], y[ROWS * H], h[ROWS * H], norm[H], gate[ROWS * W], up[ROWS * W], out[ROWS * H];
    float k[CAP * HD], v[CAP * HD], q[ROWS * 2 * HD], z[ROWS * 2 * DV], m[ROWS * N_CH], conv[ROWS * N_CH];
    float hist[2][(KERN - 1) * N_CH], S[2][STATE], delta[ROWS * 2 * DV], ab[2][ROWS * 2], head[2], logits[ROWS * EXPERTS];
    float weights[ROWS * K], w[W * H], filter[N_CH * KERN], up_w[W * H], down_w[H * W];
    uint8_t codes[W * H / 2], scales[W * H / 32 * 2], biases[W * H / 32 * 2];
    int32_t ids[ROWS * K];
} arrays;

static void fill(arrays *a)
{
    uint64_t s = 7;
    float *p = (float *)a;
    for (size_t i = 0; i < sizeof *a / sizeof *p; i++)
        p[i] = (float)((double)(test_rand(&s) >> 11) * 0x1p-53 - 0.5);
    fm_quant_get(FM_QUANT_AFFINE4)->encode_ref(a->w, W * H, 32, FM_QUANT_BF16, a->codes, a->scales, a->biases);
}

static const fm_span span = {0, ROWS, 2};
static const int32_t rows[] = {2, 0, 1};

static fm_mat plain(const float *w, int64_t n_rows, int64_t n_cols)
{
    return fm_mat_make(FM_QUANT_F32, 0, FM_QUANT_F32, n_rows, n_cols, w, NULL, NULL);
}

static fm_status call_embed(fm_backend *b, arrays *a)
{
    const int32_t ids[] = {5, 0, 31};
    const fm_mat w = fm_mat_make(FM_QUANT_AFFINE4, 32, FM_QUANT_BF16, W, H, a->codes, a->scales, a->biases);
    return b->v->embed(b, &w, ids, ROWS, a->y, H);
}
static fm_status call_rmsnorm(fm_backend *b, arrays *a) { return b->v->rmsnorm(b, a->y, H, a->norm, 1e-6f, a->y, H, ROWS, H); }
static fm_status call_matmul(fm_backend *b, arrays *a)
{
    const fm_mat q = fm_mat_make(FM_QUANT_AFFINE4, 32, FM_QUANT_BF16, W, H, a->codes, a->scales, a->biases);
    const fm_mat w = plain(a->up_w, W, H);
    const fm_matmul_item items[] = {{&w, a->norm, a->gate, W, false, false}, {&q, NULL, a->up, W, false, true}};
    return b->v->matmul(b, a->x, H, ROWS, items, 2);
}
static fm_status call_add(fm_backend *b, arrays *a)
{
    const fm_mat w = plain(a->down_w, H, W);
    const fm_matmul_item item = {&w, a->norm, a->y, H, true, false};
    return b->v->matmul(b, a->gate, W, ROWS, &item, 1);
}
static fm_status call_clip(fm_backend *b, arrays *a) { return b->v->clip(b, a->y, ROWS * H, 0.3f); }
static fm_status call_rope(fm_backend *b, arrays *a)
{
    static const double freq[] = {1, 0.1, 0.01};
    const fm_rope_args r = {a->q, 2 * HD, HD, 2, 6, freq, &span, 1};
    return b->v->rope(b, &r);
}
static fm_status call_attention(fm_backend *b, arrays *a)
{
    const fm_kv kv = {a->k, a->v, CAP, FM_QUANT_F32};
    const fm_attention_args t = {
        .a = {2, 1, HD, 0.3f, a->q, a->z, 2 * HD, HD, a->y, H}, /* z as gate: any numbers do */
        .k = a->x, .v = a->h, .ld_kv = H, .spans = &span, .kv = &kv, .n_spans = 1};
    return b->v->attention(b, &t);
}
static fm_status call_conv(fm_backend *b, arrays *a)
{
    const float *in = a->hist[0];
    float *out = a->hist[1];
    const fm_conv_args c = {a->m, a->conv, N_CH, N_CH, N_CH, KERN, a->filter, &span, &in, &out, 1};
    return b->v->conv(b, &c);
}
static fm_status call_delta(fm_backend *b, arrays *a)
{
    const float *in = a->S[0];
    float *out = a->S[1];
    const fm_delta_batch d = {
        .a = {1, 2, DK, DV, a->m, a->z, a->ab[0], a->ab[1], a->head, a->head, a->norm, 1e-6f, a->delta, N_CH, 2 * DV, 2, 2 * DV},
        .spans = &span, .S_in = &in, .S_out = &out, .n_spans = 1};
    return b->v->delta(b, &d);
}
static fm_status call_swiglu(fm_backend *b, arrays *a) { return b->v->swiglu(b, a->gate, a->up, a->gate, ROWS * W); }
static fm_status call_route(fm_backend *b, arrays *a)
{
    const fm_route_args r = {.n_experts = EXPERTS, .k = K, .renorm = 1, .scale = 1};
    return b->v->route(b, &r, a->logits, ROWS, a->ids, a->weights);
}
static fm_status call_experts(fm_backend *b, arrays *a)
{
    const fm_mat q = fm_mat_make(FM_QUANT_AFFINE4, 32, FM_QUANT_BF16, W, H, a->codes, a->scales, a->biases);
    const fm_expert_job jobs[] = {{q, plain(a->up_w, W, H), plain(a->down_w, H, W), rows, 2, 1},
                                  {q, plain(a->up_w, W, H), plain(a->down_w, H, W), rows + 2, 1, 0}};
    const fm_expert_args e = {a->x, ROWS, jobs, 2, a->gate, a->up, a->out};
    return b->v->experts(b, &e);
}
static fm_status call_combine(fm_backend *b, arrays *a)
{
    static const int32_t start[] = {0, 2, 2, 3}, index[] = {2, 0, 1};
    const fm_combine_args c = {a->y, ROWS, H, a->h, start, index, a->norm, ROWS};
    return b->v->combine(b, &c);
}
static fm_status call_add_gated(fm_backend *b, arrays *a) { return b->v->add_gated(b, a->x, a->norm, a->y, ROWS, H); }
static fm_status call_nonfinite(fm_backend *b, arrays *a)
{
    int64_t row;
    return b->v->find_nonfinite(b, a->x, ROWS, H, &row);
}

static arrays a, want, start;

typedef struct op {
    fm_status (*call)(fm_backend *b, arrays *a);
    float *wrong;
    const char *name, *part;
} op;

static const op ops[] = {
    {call_embed, &a.y[70], "embed of 3 ids, affine4 [32, 64]", "y[1, 6]"},
    {call_rmsnorm, &a.y[3], "rmsnorm of [3, 64]", "y[0, 3]"},
    {call_matmul, &a.gate[33], "matmul of 3 rows, matrix 1 of 2, f32 [32, 64] + bias", "y[1, 1]"},
    {call_matmul, &a.up[95], "matmul of 3 rows, matrix 2 of 2, affine4 [32, 64]", "y[2, 31]"},
    {call_add, &a.y[100], "matrix 1 of 1, f32 [64, 32] + bias, added", "y[1, 36]"},
    {call_clip, &a.y[5], "clip of 192 numbers", "x[0, 5]"},
    {call_rope, &a.q[9], "rope of 3 rows, 2 heads, rot 6", "x[0, 9]"},
    {call_rope, &a.q[7], "rope", "x[0, 7]"}, /* past the rotated part: bound 0 */
    {call_attention, &a.y[64 + HD + 1], "attention of 1 spans, the first of 3 rows after 2, 2/1 heads of 8", "y[1, 9]"},
    {call_attention, &a.k[4 * HD + 1], "attention", "K cache[4, 1]"},
    {call_attention, &a.v[2 * HD], "attention", "V cache[2, 0]"},
    {call_conv, &a.conv[N_CH], "conv of 1 spans, the first of 3 rows, 24 channels", "y[1, 0]"},
    {call_conv, &a.hist[1][N_CH + 2], "conv", "state[1, 2]"},
    {call_delta, &a.delta[2 * 2 * DV + DV], "delta of 1 spans, the first of 3 rows, 2/1 heads of 8x4", "y["},
    {call_delta, &a.S[1][DK * DV + DV + 3], "delta", "state[1, 3]"},
    {call_swiglu, &a.gate[40], "swiglu of 96 numbers", "y[0, 40]"},
    {call_route, (float *)&a.ids[3], "route of 3 rows, 2 of 6 experts", "ids[1, 1]"},
    {call_route, &a.weights[2], "route", "weights[0, 0]"},
    {call_experts, &a.out[H + 7], "experts on 3 rows, job 1 of 2, gate affine4 [32, 64], down f32", "out[0, 7]"},
    {call_experts, &a.out[0], "job 2 of 2", "out[0, 0]"},
    {call_combine, &a.y[1], "combine of [3, 64]", "y[0, 1]"},
    {call_add_gated, &a.y[191], "add_gated of [3, 64]", "y[2, 63]"},
    {call_nonfinite, &a.x[0], "find_nonfinite in [3, 64]", "row[0, 0]"},
};

static void test_honest_device_keeps_its_bits(void)
{
    for (int i = 0; i < FM_COUNT(ops); i++) {
        victim = NULL;
        a = want = start;
        CHECK(ops[i].call(judge, &want) == FM_OK);
        CHECK(ops[i].call(both, &a) == FM_OK);
        CHECK(memcmp(&a, &want, sizeof a) == 0 || ops[i].call == call_experts); /* whose scratch is not a result */
        CHECK(memcmp(a.out, want.out, sizeof a.out) == 0);
        CHECK(fm_backend_compare_worst(both) == 0);
    }
}

static void test_each_wrong_number_is_named(void)
{
    for (int i = 0; i < FM_COUNT(ops); i++) {
        a = start;
        victim = ops[i].wrong;
        both->layer = i % 2 ? 11 : -1;
        CHECK_INT(ops[i].call(both, &a), FM_ERR_BACKEND);
        const char *text = fm_last_error()->message;
        CHECK_CONTAINS(text, ops[i].name);
        CHECK_CONTAINS(text, ops[i].part);
        CHECK_CONTAINS(text, "on 'liar' and");
        CHECK((strstr(text, " in layer 11, ") != NULL) == (i % 2 == 1));
        CHECK(fm_backend_compare_worst(both) > 1);
    }
    victim = NULL;
    a = start;
    CHECK(call_matmul(both, &a) == FM_OK); /* and the next op is judged anew */
}

static void test_infinities_agree(void)
{
    a = start;
    victim = NULL;
    a.gate[0] = INFINITY;
    CHECK(call_swiglu(both, &a) == FM_OK);
    a = start;
    a.gate[1] = NAN;
    CHECK(call_swiglu(both, &a) == FM_OK);
    a = start;
    victim = &a.gate[1];
    a.gate[1] = INFINITY;
    a.up[1] = 0; /* NaN on both, whatever is added */
    CHECK(call_swiglu(both, &a) == FM_OK);
}

static void test_only_near_ties_of_sigmoids_may_swap(void)
{
    const float near[] = {0.25f, 0.25f + 0x1p-22f, -1}, far[] = {0.25f, 0.2501f, -1};
    fm_route_args r = {.n_experts = 3, .k = 2, .sigmoid = 1, .renorm = 1, .scale = 1};
    int32_t ids[2];
    float weights[2];
    victim = NULL;
    swap = true;
    CHECK(both->v->route(both, &r, near, 1, ids, weights) == FM_OK);
    CHECK_INT(both->v->route(both, &r, far, 1, ids, weights), FM_ERR_BACKEND);
    r.sigmoid = 0;
    CHECK_INT(both->v->route(both, &r, near, 1, ids, weights), FM_ERR_BACKEND);
    swap = false;
}

static void test_judges(void)
{
    fm_backend *out = NULL, *slow = NULL;
    const fm_backend_opts opts = {"cpu", pool, FM_NUMERIC_EXACT};
    setenv("FLASHMOE_COMPARE", "gpu", 1);
    CHECK_INT(fm_backend_open(&opts, &out), FM_ERR_ARG);
    CHECK_CONTAINS(fm_last_error()->message, "FLASHMOE_COMPARE: backend 'gpu' is unknown; there are: cpu, metal");
    setenv("FLASHMOE_COMPARE", "cpu", 1);
    CHECK_INT(fm_backend_open(&opts, &out), FM_ERR_ARG);
    CHECK_CONTAINS(fm_last_error()->message, "FLASHMOE_COMPARE=cpu compares another backend with 'cpu'");
    CHECK(out == NULL);
    setenv("FLASHMOE_COMPARE", "", 1);
    CHECK(fm_backend_open(&opts, &slow) == FM_OK);
    unsetenv("FLASHMOE_COMPARE");
    fm_backend_close(slow);
    CHECK_CONTAINS(both->v->name, "liar, compared with cpu");
    CHECK(fm_backend_compare_device(both) == device);
}

static fm_caps late_caps(const fm_backend *b)
{
    (void)b;
    return (fm_caps){.unified_memory = true, .asynchronous = true};
}

static void test_judge_must_work_at_once(void)
{
    fm_backend *out;
    const fm_backend_vtable *before = judge->v;
    fm_backend_vtable late = *before;
    late.caps = late_caps;
    late.name = "late";
    judge->v = &late;
    CHECK_INT(fm_backend_compare_open(device, judge, pool, &out), FM_ERR_UNSUPPORTED);
    CHECK_CONTAINS(fm_last_error()->message, "'late' cannot judge 'liar'");
    judge->v = before;
}

int main(void)
{
    if (fm_pool_open(2, &pool) != FM_OK)
        return 1;
    fill(&start);
    RUN(open_both);
    if (!both)
        return 1;
    RUN(test_honest_device_keeps_its_bits);
    RUN(test_each_wrong_number_is_named);
    RUN(test_infinities_agree);
    RUN(test_only_near_ties_of_sigmoids_may_swap);
    RUN(test_judges);
    RUN(test_judge_must_work_at_once);
    fm_backend_close(both);
    fm_pool_close(pool);
    TEST_EXIT();
}
