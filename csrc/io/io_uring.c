/* Owns: reading through one Linux io_uring, by the kernel's ABI (no liburing). Whoever submits fills
 * the ring. A few helper threads take turns: one leads, that is, it sleeps in the kernel, reaps what
 * was read and fills the ring again; the others check what was read and hand it on. */
#include "io/io_method.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#define HAVE_IO_URING 1
#endif
#endif

#if defined(HAVE_IO_URING)
#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "io/io_waiter.h"

enum { DEFAULT_DEPTH = 16, MAX_DEPTH = 1024, HELPERS = 2, SPARE = 4 /* ring entries for no-ops */ };
#define WAKE_UP UINT64_MAX /* user_data of a no-op; others are slot numbers */
enum { MAX_BUFFERS = 1 << 14 /* the kernel's limits */, MAX_BUFFER_BYTES = 1 << 30 };

/* Buffers that the kernel may pin once instead of at every read into them: each when it is first read into. */
typedef struct buffers {
    uint8_t *base;
    size_t stride;
    int n;       /* 0: no table */
    bool *known; /* [n] registered */
    bool refused; /* no more of them */
} buffers;

typedef struct slot {
    fm_io_req *req;
    fm_io_part part;
} slot;

typedef struct ring {
    fm_io *io;
    int fd;
    bool fixed_files;
    buffers buffers;
    fm_io_waiter out;
    pthread_cond_t work;
    bool led, stop; /* led: a helper sleeps in the kernel or is about to */
    pthread_t helpers[HELPERS];
    int n_helpers;
    /* the kernel's rings, in one mapping */
    void *rings;
    size_t rings_bytes, sqes_bytes;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned *sq_head, *sq_tail, *cq_head, *cq_tail, *sq_array;
    unsigned sq_mask, cq_mask;
    /* requests: queued -> a slot in the ring -> read -> done */
    fm_io_queue queued[FM_IO_N_PRIORITIES], read;
    slot *slots;
    int *free_slots;
    int depth, n_free, n_speculative;
} ring;

static int ring_setup(unsigned entries, struct io_uring_params *p)
{
    return (int)syscall(__NR_io_uring_setup, entries, p);
}

static int ring_enter(int fd, unsigned n_submit, unsigned n_wait, unsigned flags)
{
    const int n = (int)syscall(__NR_io_uring_enter, fd, n_submit, n_wait, flags, NULL, 0);
    return n < 0 ? -errno : n;
}

/* Entries the kernel has not taken yet. It may lag behind only after a refused enter. */
static unsigned n_unsubmitted(const ring *r)
{
    return *r->sq_tail - __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE);
}

static int n_in_kernel(const ring *r)
{
    return r->depth - r->n_free - (int)n_unsubmitted(r);
}

/* The next free entry. There always is one: the ring is larger than depth. */
static struct io_uring_sqe *next_sqe(const ring *r)
{
    const unsigned tail = *r->sq_tail, at = tail & r->sq_mask;
    memset(&r->sqes[at], 0, sizeof(r->sqes[at]));
    r->sq_array[at] = at;
    return &r->sqes[at];
}

static void push_sqe(ring *r)
{
    __atomic_store_n(r->sq_tail, *r->sq_tail + 1, __ATOMIC_RELEASE);
}

#if defined(IORING_RSRC_REGISTER_SPARSE)
/* bytes 0 takes the buffer out of the table. Returns 0 or -errno. */
static int register_buffer(const ring *r, int i, size_t bytes)
{
    const struct iovec one = {bytes > 0 ? r->buffers.base + (size_t)i * r->buffers.stride : NULL, bytes};
    const struct io_uring_rsrc_update2 update = {
        .offset = (uint32_t)i, .data = (uint64_t)(uintptr_t)&one, .nr = 1};
    const long n =
        syscall(__NR_io_uring_register, r->fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
    return n == 1 ? 0 : n < 0 ? -errno : -EAGAIN;
}

static int register_table(const ring *r, int n)
{
    const struct io_uring_rsrc_register table = {.nr = (uint32_t)n, .flags = IORING_RSRC_REGISTER_SPARSE};
    const long rc = syscall(__NR_io_uring_register, r->fd, IORING_REGISTER_BUFFERS2, &table, sizeof(table));
    return rc < 0 ? -errno : 0;
}
#else /* headers before Linux 5.19 */
static int register_buffer(const ring *r, int i, size_t bytes)
{
    (void)r, (void)i, (void)bytes;
    return -ENOSYS;
}

static int register_table(const ring *r, int n)
{
    (void)r, (void)n;
    return -ENOSYS;
}
#endif

/* The registered buffer that a part lies in; -1: in none. */
static int buffer_of(ring *r, const fm_io_part *part)
{
    buffers *const b = &r->buffers;
    if (b->n == 0 || part->dst < b->base)
        return -1;
    const size_t at = (size_t)(part->dst - b->base), i = at / b->stride;
    if (i >= (size_t)b->n || part->bytes > b->stride - at % b->stride)
        return -1;
    if (!b->known[i] && !b->refused) {
        const int rc = register_buffer(r, (int)i, b->stride);
        b->known[i] = rc == 0;
        b->refused = rc != 0;
        if (rc != 0) /* as a rule RLIMIT_MEMLOCK */
            fm_log(FM_LOG_DEBUG, "io_uring: no more buffers registered: %s", strerror(-rc));
    }
    return b->known[i] ? (int)i : -1;
}

static void push_part(ring *r, int i)
{
    slot *const s = &r->slots[i];
    struct io_uring_sqe *const e = next_sqe(r);
    s->part = fm_io_next_part(r->io, s->req);
    const int buffer = buffer_of(r, &s->part);
    e->opcode = buffer < 0 ? IORING_OP_READ : IORING_OP_READ_FIXED;
    e->buf_index = (uint16_t)(buffer < 0 ? 0 : buffer);
    atomic_fetch_add(&r->io->n_registered, buffer >= 0);
    e->fd = r->fixed_files ? s->req->file : s->part.fd;
    /* A cached read would be copied, or wait for read-ahead, inside the submitting call. */
    e->flags = (r->fixed_files ? IOSQE_FIXED_FILE : 0) | (r->io->caps.direct ? 0 : IOSQE_ASYNC);
    e->off = (uint64_t)s->part.off;
    e->addr = (uint64_t)(uintptr_t)s->part.dst;
    e->len = (uint32_t)s->part.bytes;
    e->user_data = (uint64_t)i;
    push_sqe(r);
}

static void free_slot(ring *r, int i)
{
    r->n_speculative -= r->slots[i].req->priority == 1;
    r->slots[i].req = NULL;
    r->free_slots[r->n_free++] = i;
}

/* One raw result: the request goes on, or joins the done ones. */
static void advance(ring *r, int i, int64_t result)
{
    fm_io_req *const req = r->slots[i].req;
    /* When a submitting thread ends, the kernel cancels what it had submitted: ask again. */
    if (result == -ECANCELED)
        result = -EAGAIN;
    if (!fm_io_advance(r->io, req, &r->slots[i].part, result)) {
        push_part(r, i);
        return;
    }
    free_slot(r, i);
    fm_io_stop(req);
    fm_io_queue_push(&r->read, req);
}

static void reap(ring *r)
{
    const unsigned tail = __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE);
    unsigned head = *r->cq_head;
    for (; head != tail; head++) {
        const struct io_uring_cqe cqe = r->cqes[head & r->cq_mask];
        if (cqe.user_data != WAKE_UP)
            advance(r, (int)cqe.user_data, cqe.res);
    }
    __atomic_store_n(r->cq_head, head, __ATOMIC_RELEASE);
}

/* The kernel refuses the ring itself (which should not happen): what it has not taken fails. */
static void fail_unsubmitted(ring *r, int err)
{
    for (unsigned n = n_unsubmitted(r); n > 0; n--) {
        const unsigned tail = *r->sq_tail - 1;
        const uint64_t i = r->sqes[tail & r->sq_mask].user_data;
        __atomic_store_n(r->sq_tail, tail, __ATOMIC_RELEASE);
        if (i == WAKE_UP)
            continue;
        fm_io_req *const req = r->slots[i].req;
        req->status = FM_ERR_IO;
        req->err = err;
        free_slot(r, (int)i);
        fm_io_stop(req);
        fm_io_queue_push(&r->read, req);
    }
}

/* Fill the ring from the queues, demand first, and hand it to the kernel. */
static void pump(ring *r)
{
    while (r->n_free > 0) {
        fm_io_req *const req =
            fm_io_queue_pop_next(r->queued, r->n_speculative, fm_io_max_speculative(r->depth));
        if (req == NULL)
            break;
        const int i = r->free_slots[--r->n_free];
        r->slots[i].req = req;
        r->n_speculative += req->priority == 1;
        req->state = FM_IO_RUNNING;
        fm_io_start(req);
        push_part(r, i);
    }
    for (unsigned n = n_unsubmitted(r); n > 0; n = n_unsubmitted(r)) {
        const int rc = ring_enter(r->fd, n, 0, 0);
        if (rc >= 0 || rc == -EINTR)
            continue;
        if (rc != -EAGAIN && rc != -EBUSY) {
            fail_unsubmitted(r, -rc);
            return;
        }
        if (n_in_kernel(r) > 0) /* short of memory: a completion will bring us back here */
            return;
        const struct timespec pause = {0, 100000};
        nanosleep(&pause, NULL);
    }
}

/* Whether a helper that sleeps would find something to do. */
static bool has_work(const ring *r)
{
    return r->read.n > 0 || (!r->led && n_in_kernel(r) > 0);
}

static void call_helper(ring *r)
{
    if (has_work(r))
        pthread_cond_signal(&r->work);
}

static void lead(ring *r)
{
    r->led = true;
    pthread_mutex_unlock(&r->out.lock);
    (void)ring_enter(r->fd, 0, 1, IORING_ENTER_GETEVENTS);
    pthread_mutex_lock(&r->out.lock);
    r->led = false;
    reap(r);
    pump(r);
}

static void check(ring *r, fm_io_req *req)
{
    call_helper(r);
    pthread_mutex_unlock(&r->out.lock);
    fm_io_finish(r->io, req);
    pthread_mutex_lock(&r->out.lock);
    fm_io_waiter_complete(&r->out, req);
}

static void *helper_main(void *arg)
{
    ring *const r = arg;
    pthread_mutex_lock(&r->out.lock);
    while (!r->stop) {
        fm_io_req *const req = fm_io_queue_pop(&r->read);
        if (req != NULL)
            check(r, req);
        else if (has_work(r))
            lead(r);
        else
            pthread_cond_wait(&r->work, &r->out.lock);
    }
    pthread_mutex_unlock(&r->out.lock);
    return NULL;
}

static fm_status submit_uring(void *state, fm_io_req *const *reqs, int n)
{
    ring *const r = state;
    pthread_mutex_lock(&r->out.lock);
    for (int i = 0; i < n; i++)
        fm_io_queue_push(&r->queued[reqs[i]->priority], reqs[i]);
    pump(r);
    call_helper(r);
    pthread_mutex_unlock(&r->out.lock);
    return FM_OK;
}

static fm_status wait_uring(void *state, fm_io_req **done, int max_done, int min_done,
                            int64_t timeout_ns, int *n_done)
{
    ring *const r = state;
    fm_io_waiter_wait(&r->out, done, max_done, min_done, timeout_ns, n_done);
    return FM_OK;
}

static void cancel_uring(void *state, fm_io_req *req)
{
    ring *const r = state;
    fm_io_waiter_cancel(&r->out, r->queued, req);
}

/* Into the ring at once: a leader would fill it only when something completes. */
static void promote_uring(void *state, fm_io_req *req)
{
    ring *const r = state;
    pthread_mutex_lock(&r->out.lock);
    if (fm_io_queue_promote(r->queued, req)) {
        pump(r);
        call_helper(r);
    }
    pthread_mutex_unlock(&r->out.lock);
}

static void set_buffers_uring(void *state, void *base, size_t stride, int64_t n)
{
    ring *const r = state;
    buffers *const b = &r->buffers;
    void *known = NULL;
    const int n_table = (int)(n < MAX_BUFFERS ? n : MAX_BUFFERS); /* reads into others do without */
    if (stride > MAX_BUFFER_BYTES || fm_alloc((size_t)n_table, &known) != FM_OK)
        return;
    const int rc = register_table(r, n_table);
    if (rc != 0) {
        fm_log(FM_LOG_DEBUG, "io_uring: no table of buffers: %s", strerror(-rc));
        fm_free(known);
        return;
    }
    /* A forked child may not use them anyway, and would be given copies of pinned pages. */
    (void)madvise(base, (size_t)n * stride, MADV_DONTFORK);
    pthread_mutex_lock(&r->out.lock);
    *b = (buffers){base, stride, n_table, known, false};
    pthread_mutex_unlock(&r->out.lock);
}

static void drop_buffers_uring(void *state, int64_t first)
{
    ring *const r = state;
    pthread_mutex_lock(&r->out.lock);
    for (int64_t i = first; i < r->buffers.n; i++)
        if (r->buffers.known[i])
            r->buffers.known[i] = register_buffer(r, (int)i, 0) != 0;
    pthread_mutex_unlock(&r->out.lock);
}

static void unmap_ring(ring *r)
{
    if (r->sqes != NULL)
        munmap(r->sqes, r->sqes_bytes);
    if (r->rings != NULL)
        munmap(r->rings, r->rings_bytes);
    if (r->fd >= 0)
        close(r->fd);
    fm_free(r->buffers.known);
    fm_free(r->free_slots);
    fm_free(r->slots);
    fm_free(r);
}

static void stop_helpers(ring *r)
{
    pthread_mutex_lock(&r->out.lock);
    r->stop = true;
    memset(r->queued, 0, sizeof(r->queued));
    if (r->led) { /* it sleeps in the kernel */
        struct io_uring_sqe *const e = next_sqe(r);
        e->opcode = IORING_OP_NOP;
        e->user_data = WAKE_UP;
        push_sqe(r);
        pump(r);
    }
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->out.lock);
    for (int i = 0; i < r->n_helpers; i++)
        pthread_join(r->helpers[i], NULL);
}

static void close_uring(void *state)
{
    ring *const r = state;
    stop_helpers(r);
    /* The kernel still writes to the callers' memory: stay until it has finished. */
    for (reap(r); r->n_free < r->depth; reap(r)) {
        pump(r);
        (void)ring_enter(r->fd, 0, 1, IORING_ENTER_GETEVENTS);
    }
    pthread_cond_destroy(&r->work);
    fm_io_waiter_destroy(&r->out);
    unmap_ring(r);
}

static fm_status map_ring(ring *r, const struct io_uring_params *p)
{
    const size_t sq = p->sq_off.array + p->sq_entries * sizeof(unsigned);
    const size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    r->rings_bytes = sq > cq ? sq : cq;
    r->sqes_bytes = p->sq_entries * sizeof(struct io_uring_sqe);
    uint8_t *const m = mmap(NULL, r->rings_bytes, prot, flags, r->fd, IORING_OFF_SQ_RING);
    if (m == MAP_FAILED)
        return fm_fail(FM_ERR_NOMEM, "io_uring: cannot map the rings: %s", strerror(errno));
    r->rings = m;
    void *const sqes = mmap(NULL, r->sqes_bytes, prot, flags, r->fd, IORING_OFF_SQES);
    if (sqes == MAP_FAILED)
        return fm_fail(FM_ERR_NOMEM, "io_uring: cannot map the entries: %s", strerror(errno));
    r->sqes = sqes;
    r->sq_head = (unsigned *)(m + p->sq_off.head);
    r->sq_tail = (unsigned *)(m + p->sq_off.tail);
    r->sq_mask = *(unsigned *)(m + p->sq_off.ring_mask);
    r->sq_array = (unsigned *)(m + p->sq_off.array);
    r->cq_head = (unsigned *)(m + p->cq_off.head);
    r->cq_tail = (unsigned *)(m + p->cq_off.tail);
    r->cq_mask = *(unsigned *)(m + p->cq_off.ring_mask);
    r->cqes = (struct io_uring_cqe *)(m + p->cq_off.cqes);
    return FM_OK;
}

/* Spares the kernel a look-up per read. Refused (too many files): plain descriptors do too. */
static fm_status register_files(ring *r)
{
    void *fds = NULL;
    FM_TRY(fm_alloc((size_t)r->io->n_files * sizeof(int), &fds));
    for (int i = 0; i < r->io->n_files; i++) {
        const fm_io_file *const f = &r->io->files[i];
        ((int *)fds)[i] = r->io->caps.direct ? f->fd_direct : f->fd;
    }
    r->fixed_files =
        syscall(__NR_io_uring_register, r->fd, IORING_REGISTER_FILES, fds, r->io->n_files) == 0;
    if (!r->fixed_files)
        fm_log(FM_LOG_DEBUG, "io_uring: files not registered: %s", strerror(errno));
    fm_free(fds);
    return FM_OK;
}

static fm_status start_ring(ring *r)
{
    struct io_uring_params p = {.flags = IORING_SETUP_CLAMP};
    void *memory = NULL;
    r->fd = ring_setup((unsigned)(r->depth + SPARE), &p);
    if (r->fd < 0)
        return fm_fail(FM_ERR_UNSUPPORTED, "io_uring: the kernel refuses it: %s", strerror(errno));
    const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL;
    if ((p.features & needed) != needed)
        return fm_fail(FM_ERR_UNSUPPORTED, "io_uring: needs Linux 5.7 or newer");
    FM_TRY(map_ring(r, &p));
    FM_TRY(fm_alloc((size_t)r->depth * sizeof(slot), &memory));
    r->slots = memory;
    FM_TRY(fm_alloc((size_t)r->depth * sizeof(int), &memory));
    r->free_slots = memory;
    for (int i = r->depth; i-- > 0;)
        r->free_slots[r->n_free++] = i;
    return register_files(r);
}

static fm_status open_uring(fm_io *io, const fm_io_opts *opts, void **state)
{
    void *memory = NULL;
    const int depth = opts->n_workers > 0 ? opts->n_workers : DEFAULT_DEPTH;
    if (depth > MAX_DEPTH)
        return fm_fail(FM_ERR_ARG, "io_uring: depth %d asked, 1 to %d are possible", depth,
                       MAX_DEPTH);
    FM_TRY(fm_alloc(sizeof(ring), &memory));
    ring *const r = memory;
    r->io = io;
    r->fd = -1;
    r->depth = depth;
    fm_status s = start_ring(r);
    if (s != FM_OK) {
        unmap_ring(r);
        return s;
    }
    fm_io_waiter_init(&r->out);
    pthread_cond_init(&r->work, NULL);
    /* one read at a time is handed on in order */
    s = fm_io_start_threads(r->helpers, depth < HELPERS ? depth : HELPERS, helper_main, r, &r->n_helpers);
    if (s != FM_OK) {
        close_uring(r);
        return s;
    }
    *state = r;
    return FM_OK;
}

const fm_io_method fm_io_method_uring = {
    .name = "uring",
    .can_direct = true,
    .one_reaper = true,
    .open = open_uring,
    .close = close_uring,
    .submit = submit_uring,
    .wait = wait_uring,
    .cancel = cancel_uring,
    .promote = promote_uring,
    .set_buffers = set_buffers_uring,
    .drop_buffers = drop_buffers_uring,
};

#else
static fm_status open_absent(fm_io *io, const fm_io_opts *opts, void **state)
{
    (void)io, (void)opts, (void)state;
    return fm_fail(FM_ERR_UNSUPPORTED, "I/O method 'uring' needs Linux and was not built in");
}

const fm_io_method fm_io_method_uring = {.name = "uring", .can_direct = true, .open = open_absent};
#endif
