/* Private to io/: a first-in-first-out list of requests, linked through them. Not locked. */
#ifndef FM_IO_IO_QUEUE_H
#define FM_IO_IO_QUEUE_H

#include "io/io_method.h"

enum { FM_IO_N_PRIORITIES = 2 };

typedef struct fm_io_queue {
    fm_io_req *head, *tail;
    int n;
} fm_io_queue;

static inline void fm_io_queue_push(fm_io_queue *q, fm_io_req *r)
{
    r->next = NULL;
    if (q->tail != NULL)
        q->tail->next = r;
    else
        q->head = r;
    q->tail = r;
    q->n++;
}

static inline fm_io_req *fm_io_queue_pop(fm_io_queue *q)
{
    fm_io_req *const r = q->head;
    if (r != NULL) {
        q->head = r->next;
        if (q->head == NULL)
            q->tail = NULL;
        r->next = NULL;
        q->n--;
    }
    return r;
}

/* Guesses read at once, of n reads at once. A few parts of half a megabyte keep a disk busy; more would only stand in
 * the device's queue, before what is demanded next and beyond the reach of cancel. */
static inline int fm_io_max_speculative(int n)
{
    enum { ENOUGH = 6 };
    const int most = n == 1 ? 1 : n - (n + 3) / 4; /* the rest is kept for demand; one alone does both */
    return most < ENOUGH ? most : ENOUGH;
}

/* What to start next: demand first; speculation only while fewer than max_speculative of it are
 * running, so that a demand read never finds the device full of guesses. The caller counts. */
static inline fm_io_req *fm_io_queue_pop_next(fm_io_queue *by_priority, int n_speculative,
                                              int max_speculative)
{
    fm_io_req *const r = fm_io_queue_pop(&by_priority[0]);
    return r != NULL || n_speculative >= max_speculative ? r : fm_io_queue_pop(&by_priority[1]);
}

static inline bool fm_io_queue_remove(fm_io_queue *q, const fm_io_req *r)
{
    fm_io_req *before = NULL;
    for (fm_io_req *i = q->head; i != NULL; before = i, i = i->next) {
        if (i != r)
            continue;
        *(before != NULL ? &before->next : &q->head) = i->next;
        if (q->tail == i)
            q->tail = before;
        q->n--;
        return true;
    }
    return false;
}

/* A queued request becomes demand; false when it was not waiting as speculation. */
static inline bool fm_io_queue_promote(fm_io_queue *by_priority, fm_io_req *r)
{
    if (r->state != FM_IO_QUEUED || r->priority == 0 || !fm_io_queue_remove(&by_priority[1], r))
        return false;
    r->priority = 0;
    fm_io_queue_push(&by_priority[0], r);
    return true;
}

#endif
