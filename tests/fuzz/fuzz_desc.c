/* Any numbers in a model description: it is refused in words, or it holds and plans and copies cleanly.
 * The input is a list of (field, value) pairs that spoil a valid description whose arrays are exactly sized heap
 * memory. Lengths of arrays are the caller's word and only ever shrink. With -DFUZZ_LIBFUZZER a libFuzzer target;
 * otherwise a driver: files given (corpus/desc), or 10,000 seeded inputs (another number as the only argument). */
#include "../c/tiny_model.h"

#include <assert.h>
#include <ctype.h>
#include <math.h>

typedef enum kind { I32, I64, F64, FLAG, SHRINK32, SHRINK64 } kind;

typedef struct field {
    kind kind;
    void *at;
} field;

enum { MAX_FIELDS = 4096 };
static field fields[MAX_FIELDS];
static int n_fields;

static void add(kind k, const void *at)
{
    assert(n_fields < MAX_FIELDS);
    fields[n_fields++] = (field){k, (void *)(uintptr_t)at};
}

static void add_format(fm_format *f)
{
    add(I32, &f->quant);
    add(I32, &f->group);
    add(I32, &f->scale_quant);
    add(I64, &f->n_rows);
    add(I64, &f->n_cols);
}

static void list_fields(tiny *t, fm_engine_opts *o)
{
    n_fields = 0;
#define ADD_int64_t(name) add(I64, &t->c.name);
#define ADD_double(name) add(F64, &t->c.name);
#define X(type, name, low, high) ADD_##type(name)
    FM_CONFIG_LIST(X)
#undef X
    for (int l = 0; l < TINY_LAYERS + 1; l++) {
        add(I32, &t->c.mixers[l]);
        add(I32, &t->c.ffns[l]);
    }
    for (int64_t i = 0; i < t->d.n_tensors; i++) {
        fm_tensor_desc *const x = &t->tensors[i];
        const fm_piece *const p = x->pieces[0];
        add(I32, &x->id);
        add(I32, &x->layer);
        add_format(&x->format);
        add(FLAG, &x->add_one);
        add(I32, &p->file);
        add(I64, &p->off);
        add(I64, &p->n_bytes);
        add(SHRINK64, &x->n_pieces[0]);
    }
    for (int64_t l = 0; l < t->d.n_expert_layers; l++) {
        fm_expert_desc *const e = &t->experts[l];
        add(I32, &e->layer);
        for (int r = 0; r < FM_ROLE_COUNT; r++)
            add_format(&e->role[r]);
        for (int64_t i = 0; i < e->n_experts * e->n_sources; i += 5) {
            add(I32, &e->seg_file[i]);
            add(I64, &e->seg_off[i]);
        }
        add(SHRINK64, &e->n_experts);
        add(SHRINK32, &e->n_sources);
    }
    add(I64, &t->files[0].n_bytes);
    add(SHRINK64, &t->d.n_tensors);
    add(SHRINK64, &t->d.n_expert_layers);
    add(SHRINK32, &t->d.n_files);
    add(I32, &o->n_slots);
    add(I64, &o->context);
    add(I64, &o->max_rows);
    add(I64, &o->experts_per_token);
    add(I32, &o->n_threads);
}

static int64_t spoilt(int64_t was, uint8_t how, int64_t other)
{
    static const int64_t edges[] = {0, 1, -1, 2, 3, 16, 64, 4096, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN,
                                    INT64_MAX / 2, INT64_C(1) << 32, INT64_C(1) << 40, (INT64_C(1) << 40) + 1};
    const uint64_t w = (uint64_t)was; /* unsigned: the mutation itself must not overflow */
    switch (how % 24) {
    case 16: return (int64_t)(w + 1);
    case 17: return (int64_t)(w - 1);
    case 18: return (int64_t)(w * 2);
    case 19: return was / 2;
    case 20: return (int64_t)(0 - w);
    case 21: return (int64_t)(w ^ UINT64_C(1) << (other & 63));
    case 22:
    case 23: return other; /* what another field holds: the subtlest */
    default: return edges[how % 24];
    }
}

static int64_t value_of(const field *f)
{
    switch (f->kind) {
    case I32:
    case SHRINK32: return *(int32_t *)f->at;
    case F64: return (int64_t)(*(double *)f->at < 1e15 ? *(double *)f->at : 1e15);
    case FLAG: return *(bool *)f->at;
    default: return *(int64_t *)f->at;
    }
}

static void spoil(const field *f, uint8_t how, int64_t other)
{
    static const double odd[] = {NAN, INFINITY, -INFINITY, -0.0, 1e308, 5e-324, -1, 0.5};
    const int64_t was = value_of(f), v = spoilt(was, how, other);
    switch (f->kind) {
    case I32: *(int32_t *)f->at = (int32_t)(uint32_t)(uint64_t)v; break;
    case I64: *(int64_t *)f->at = v; break;
    case F64: *(double *)f->at = how & 0x80 ? odd[how % FM_COUNT(odd)] : (double)v; break;
    case FLAG: *(bool *)f->at = v & 1; break;
    case SHRINK32: *(int32_t *)f->at = v >= 0 && v < was ? (int32_t)v : (int32_t)was; break;
    case SHRINK64: *(int64_t *)f->at = v >= 0 && v < was ? v : was; break;
    }
}

static void check_error(fm_status s)
{
    assert(s == FM_ERR_FORMAT || s == FM_ERR_ARG || s == FM_ERR_UNSUPPORTED || s == FM_ERR_NOMEM);
    const char *m = fm_last_error()->message;
    assert(fm_last_error()->status == s && m[0] != '\0');
    for (; *m != '\0'; m++)
        assert(isprint((unsigned char)*m));
}

static void check_all(tiny *t, const fm_engine_opts *o)
{
    fm_engine_plan p;
    fm_status s = fm_config_check(&t->c);
    const bool config_ok = s == FM_OK;
    if (s != FM_OK)
        check_error(s);
    s = fm_desc_check(&t->d);
    if (s != FM_OK)
        check_error(s);
    else {
        fm_model_desc *copy = NULL;
        const fm_arch *arch;
        assert(fm_desc_copy(&t->d, &copy) == FM_OK && fm_desc_check(copy) == FM_OK);
        for (int i = 0; config_ok && fm_arch_name(i) != NULL; i++) {
            assert(fm_arch_find(fm_arch_name(i), &arch) == FM_OK);
            const fm_status a = fm_arch_check(arch, &t->c, copy);
            if (a != FM_OK)
                check_error(a);
        }
        fm_free(copy);
    }
    s = fm_engine_plan_bytes(&t->m, o, &p);
    if (s != FM_OK) {
        check_error(s);
        return;
    }
    assert(p.experts_per_token >= 0 && p.n_slots_min >= 0 && p.n_experts_total >= p.n_slots_min);
    assert(p.slot_bytes >= (size_t)p.expert_record_bytes_max && p.scratch_bytes > 0 && p.state_bytes > 0);
    assert(p.scratch_bytes < SIZE_MAX / 2 && p.state_bytes < SIZE_MAX / 2 && p.trunk_bytes < SIZE_MAX / 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    tiny t;
    fm_engine_opts o = FM_ENGINE_OPTS_INIT;
    tiny_make(&t, size > 0 && data[0] & 1);
    const tiny valid = t; /* its counts, to free by */
    int64_t n_pieces[64], n_experts[TINY_LAYERS];
    for (int64_t i = 0; i < t.d.n_tensors; i++)
        n_pieces[i] = t.tensors[i].n_pieces[0];
    for (int l = 0; l < TINY_LAYERS; l++)
        n_experts[l] = t.experts[l].n_experts;
    list_fields(&t, &o);
    for (size_t i = 1; i + 6 <= size && i < 6 * 16; i += 6) {
        const int at = (data[i] | data[i + 1] << 8) % n_fields, from = (data[i + 2] | data[i + 3] << 8) % n_fields;
        spoil(&fields[at], data[i + 4], data[i + 5] & 1 ? value_of(&fields[from]) : data[i + 5]);
    }
    check_all(&t, &o);
    t.d = valid.d;
    for (int64_t i = 0; i < t.d.n_tensors; i++)
        t.tensors[i].n_pieces[0] = n_pieces[i];
    for (int l = 0; l < TINY_LAYERS; l++)
        t.experts[l].n_experts = n_experts[l];
    tiny_free(&t);
    return 0;
}

#if !defined(FUZZ_LIBFUZZER)
static int run_file(const char *path)
{
    static uint8_t data[1 << 16];
    FILE *const f = fopen(path, "rb");
    if (f == NULL) {
        perror(path);
        return 1;
    }
    const size_t n = fread(data, 1, sizeof data, f);
    fclose(f);
    return LLVMFuzzerTestOneInput(data, n);
}

int main(int argc, char **argv)
{
    uint8_t data[1 + 6 * 8];
    uint64_t rng = 1;
    const bool number = argc == 2 && isdigit((unsigned char)argv[1][0]);
    const long rounds = number ? atol(argv[1]) : argc == 1 ? 10000 : 0;
    for (int i = 1; i < argc && !number; i++)
        if (run_file(argv[i]) != 0)
            return 1;
    for (long round = 0; round < rounds; round++) {
        for (size_t i = 0; i < sizeof data; i++)
            data[i] = (uint8_t)test_rand(&rng);
        LLVMFuzzerTestOneInput(data, 1 + 6 * (size_t)(round % 6)); /* few at a time reach further */
    }
    return 0;
}
#endif
