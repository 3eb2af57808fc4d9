/* Owns: scripted failure, for tests. Wraps another method; its faults strike raw reads, so that the
 * code which continues, words and survives them is the code that ships.
 *   script = [method ":"] item { "," item }
 *   item   = kind "@" N   (the Nth request, from 1) | kind "@" N "+" (it and all later) | kind "%"
 * N (every Nth) | "delay=" US ["us"] (every read) | "reorder" | "seed=" N kind   = eio | short
 * (half of the first read) | eof (nothing) | corrupt (one bit, before the CRC) */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/mem.h"
#include "io/io_method.h"

enum { MAX_RULES = 16, BATCH = 64 };
typedef enum fault_kind { EIO_FAULT, SHORT_FAULT, EOF_FAULT, CORRUPT_FAULT, N_KINDS } fault_kind;
static const char *const kind_names[N_KINDS] = {"eio", "short", "eof", "corrupt"};

typedef struct rule {
    fault_kind kind;
    char op; /* '@', '+' or '%' */
    int64_t n;
} rule;

typedef struct fault {
    fm_io *io;
    const fm_io_method *base;
    void *base_state;
    rule rules[MAX_RULES];
    int n_rules;
    int64_t delay_us;
    bool reorder;
    uint64_t seed;   /* touched by the waiter only */
    fm_io_req *held; /* completed, not yet delivered */
    int n_held;
} fault;

static bool strikes(const fault *f, fault_kind kind, int64_t seq)
{
    for (int i = 0; i < f->n_rules && seq > 0; i++) { /* 0: a synchronous read, left alone */
        const rule *const r = &f->rules[i];
        if (r->kind == kind && (r->op == '@'   ? seq == r->n
                                : r->op == '+' ? seq >= r->n
                                               : seq % r->n == 0))
            return true;
    }
    return false;
}

static int64_t on_part(void *ctx, const fm_io_req *req, const fm_io_part *part, int64_t result)
{
    const fault *const f = ctx;
    if (f->delay_us > 0 && f->base->one_reaper) {
        /* The thread that sees this must not sleep: let it ask again until the time has come. */
        if (fm_clock_ns() - req->ns_read < f->delay_us * 1000)
            return -EAGAIN;
    } else if (f->delay_us > 0) {
        const struct timespec t = {f->delay_us / 1000000, f->delay_us % 1000000 * 1000};
        nanosleep(&t, NULL);
    }
    if (req->done_bytes > 0)
        return result;
    if (strikes(f, EIO_FAULT, req->seq))
        return -EIO;
    if (strikes(f, EOF_FAULT, req->seq))
        return 0;
    if (result > 1 && strikes(f, SHORT_FAULT, req->seq)) {
        /* What did not arrive must not be there by luck. */
        memset(part->dst + result / 2, 0xA5, (size_t)(result - result / 2));
        return result / 2;
    }
    return result;
}

static void on_data(void *ctx, const fm_io_req *req)
{
    const fault *const f = ctx;
    const size_t n = req->crc_bytes > 0 ? req->crc_bytes : req->done_bytes;
    if (strikes(f, CORRUPT_FAULT, req->seq))
        ((uint8_t *)req->dst)[(req->crc_bytes > 0 ? req->crc_skip : 0) + n / 2] ^= 0x10;
}

static bool read_number(const char **s, int64_t *out)
{
    char *end = NULL;
    if (!isdigit((unsigned char)**s))
        return false;
    errno = 0;
    *out = strtoll(*s, &end, 10);
    *s = end;
    return errno == 0;
}

static bool parse_rule(fault *f, const char *s, const char *end)
{
    for (int kind = 0; kind < N_KINDS; kind++) {
        const size_t len = strlen(kind_names[kind]);
        if ((size_t)(end - s) <= len || strncmp(s, kind_names[kind], len) != 0)
            continue;
        const char *p = s + len;
        rule r = {.kind = (fault_kind)kind, .op = *p++};
        if ((r.op != '@' && r.op != '%') || !read_number(&p, &r.n) || r.n < 1)
            return false;
        if (r.op == '@' && *p == '+')
            r.op = *p++;
        if (p != end || f->n_rules == MAX_RULES)
            return false;
        f->rules[f->n_rules++] = r;
        return true;
    }
    return false;
}

static bool parse_item(fault *f, const char *s, const char *end)
{
    int64_t n = 0;
    const char *p = s;
    if (strncmp(s, "delay=", 6) == 0) {
        p += 6;
        if (!read_number(&p, &f->delay_us))
            return false;
        p += strncmp(p, "us", 2) == 0 ? 2 : 0;
        return p == end && f->delay_us <= 10 * 1000 * 1000;
    }
    if (strncmp(s, "seed=", 5) == 0) {
        p += 5;
        if (!read_number(&p, &n))
            return false;
        f->seed = (uint64_t)n;
        return p == end;
    }
    if ((size_t)(end - s) == 7 && strncmp(s, "reorder", 7) == 0) {
        f->reorder = true;
        return true;
    }
    return parse_rule(f, s, end);
}

static fm_status parse_script(fault *f, const fm_io_opts *opts)
{
    const char *s = opts->fault != NULL ? opts->fault : "";
    const char *const colon = strchr(s, ':');
    const bool wrapped = strcmp(opts->method, fm_io_method_fault.name) != 0;
    const char *const base = colon != NULL ? s : wrapped ? opts->method : "pread";
    const size_t base_len = colon != NULL ? (size_t)(colon - s) : strlen(base);
    f->base = fm_io_method_find(base, base_len);
    if (f->base == NULL || f->base == &fm_io_method_fault)
        return fm_fail(FM_ERR_ARG, "fault script '%s': no method '%.*s' to wrap", s, (int)base_len,
                       base);
    if (opts->direct && !f->base->can_direct)
        return fm_fail(FM_ERR_UNSUPPORTED, "I/O method '%s' has no direct mode", f->base->name);
    for (const char *item = colon != NULL ? colon + 1 : s; *item != '\0';) {
        const char *const comma = strchr(item, ',');
        const char *const end = comma != NULL ? comma : item + strlen(item);
        if (!parse_item(f, item, end))
            return fm_fail(FM_ERR_ARG, "fault script '%s': cannot read '%.*s'", s,
                           (int)(end - item), item);
        item = comma != NULL ? comma + 1 : end;
    }
    return FM_OK;
}

static fm_status open_fault(fm_io *io, const fm_io_opts *opts, void **state)
{
    void *memory = NULL;
    FM_TRY(fm_alloc(sizeof(fault), &memory));
    fault *const f = memory;
    f->io = io;
    f->seed = 1;
    fm_status s = parse_script(f, opts);
    if (s == FM_OK)
        s = f->base->open(io, opts, &f->base_state);
    if (s != FM_OK) {
        fm_free(f);
        return s;
    }
    io->tap = (fm_io_tap){f, on_part, on_data};
    *state = f;
    return FM_OK;
}

static void close_fault(void *state)
{
    fault *const f = state;
    f->base->close(f->base_state);
    fm_free(f);
}

static fm_status submit_fault(void *state, fm_io_req *const *reqs, int n)
{
    fault *const f = state;
    return f->base->submit(f->base_state, reqs, n);
}

static uint64_t next_random(fault *f)
{
    f->seed = f->seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return f->seed >> 33;
}

static fm_io_req *take_held(fault *f)
{
    fm_io_req **at = &f->held;
    for (uint64_t skip = next_random(f) % (uint64_t)f->n_held; skip > 0; skip--)
        at = &(*at)->next;
    fm_io_req *const r = *at;
    *at = r->next;
    r->next = NULL;
    f->n_held--;
    return r;
}

/* Waits for one more than asked where it can, delivers in random order and keeps some back. */
static fm_status wait_reordered(fault *f, fm_io_req **done, int max_done, int min_done,
                                int64_t timeout_ns, int *n_done)
{
    const int n_in_flight = atomic_load(&f->io->n_in_flight);
    const int target = min_done == 0 || min_done >= n_in_flight ? min_done : min_done + 1;
    int n = 0;
    do {
        fm_io_req *batch[BATCH];
        const int left = target - f->n_held, need = left < 0 ? 0 : left > BATCH ? BATCH : left;
        FM_TRY(f->base->wait(f->base_state, batch, BATCH, need, timeout_ns, &n));
        for (int i = 0; i < n; i++) {
            batch[i]->next = f->held;
            f->held = batch[i];
            f->n_held++;
        }
    } while (n > 0 && f->n_held < target);
    n = f->n_held > 0 ? 1 + (int)(next_random(f) % (uint64_t)f->n_held) : 0;
    n = n < min_done ? min_done : n;
    n = n > max_done ? max_done : n;
    n = n > f->n_held ? f->n_held : n;
    for (int i = 0; i < n; i++)
        done[i] = take_held(f);
    *n_done = n;
    return FM_OK;
}

static fm_status wait_fault(void *state, fm_io_req **done, int max_done, int min_done,
                            int64_t timeout_ns, int *n_done)
{
    fault *const f = state;
    if (f->reorder)
        return wait_reordered(f, done, max_done, min_done, timeout_ns, n_done);
    return f->base->wait(f->base_state, done, max_done, min_done, timeout_ns, n_done);
}

static void cancel_fault(void *state, fm_io_req *req)
{
    fault *const f = state;
    f->base->cancel(f->base_state, req);
}

static void promote_fault(void *state, fm_io_req *req)
{
    fault *const f = state;
    f->base->promote(f->base_state, req);
}

static void set_buffers_fault(void *state, void *base, size_t stride, int64_t n)
{
    fault *const f = state;
    if (f->base->set_buffers != NULL)
        f->base->set_buffers(f->base_state, base, stride, n);
}

static void drop_buffers_fault(void *state, int64_t first)
{
    fault *const f = state;
    if (f->base->drop_buffers != NULL)
        f->base->drop_buffers(f->base_state, first);
}

const fm_io_method fm_io_method_fault = {
    .name = "fault",
    .can_direct = true,
    .open = open_fault,
    .close = close_fault,
    .submit = submit_fault,
    .wait = wait_fault,
    .cancel = cancel_fault,
    .promote = promote_fault,
    .set_buffers = set_buffers_fault,
    .drop_buffers = drop_buffers_fault,
};
