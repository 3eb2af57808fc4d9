# Owns: one token from one row of logits.  Knows nothing of models, text or the C core.
#
# The chain is: padding cut -> logit bias -> penalties -> temperature -> top-k -> top-p -> min-p -> draw.
# Every tie is broken towards the smaller id, and the generator is our own, so that a seed gives the
# same text everywhere.  Ranges of the options are checked in generation.SamplingConfig.
"""Sampling of tokens from logits, see :class:`Sampler`."""

from libc.math cimport INFINITY, exp, isnan, log
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

import numpy as np

from flashmoe.errors import ArgumentError, StateError

__all__ = ["Sampler"]


cdef inline uint64_t splitmix64(uint64_t *x) noexcept nogil:
    x[0] += <uint64_t>0x9E3779B97F4A7C15
    cdef uint64_t z = x[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline uint64_t rotl(uint64_t x, int k) noexcept nogil:
    return (x << k) | (x >> (64 - k))


cdef inline uint64_t xoshiro256ss(uint64_t *s) noexcept nogil:
    # Source: Blackman & Vigna, "Scrambled linear pseudorandom number generators" (2021), xoshiro256**.
    cdef uint64_t result = rotl(s[1] * 5, 7) * 9
    cdef uint64_t t = s[1] << 17
    s[2] ^= s[0]
    s[3] ^= s[1]
    s[1] ^= s[2]
    s[0] ^= s[3]
    s[2] ^= t
    s[3] = rotl(s[3], 45)
    return result


cdef inline bint better(const float *v, int32_t a, int32_t b) noexcept nogil:
    return v[a] > v[b] or (v[a] == v[b] and a < b)


cdef void sift_down(const float *v, int32_t *heap, int n, int i) noexcept nogil:
    # A heap with the worst candidate at the root.
    cdef int child
    cdef int32_t top = heap[i]
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and better(v, heap[child], heap[child + 1]):
            child += 1
        if not better(v, top, heap[child]):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = top


# A vocabulary has 10^5 ids and few that matter: whole blocks are passed over by their largest value,
# found by loops of fixed length over integers, which compilers turn into vector code.
cdef enum:
    BLOCK = 64
    KEY_INF = 0x7f800000  # of +inf; NaN lies above it, or, with the sign bit set, below KEY_LOW
    KEY_LOW = -0x7f800001  # of -inf
    BINS = 512  # of probability mass, so many PER_NAT below the best
    PER_NAT = 8


cdef inline int32_t key_of(float x) noexcept nogil:
    # Orders as floats do, but -0 before 0.
    cdef int32_t b
    memcpy(&b, &x, sizeof(b))
    return b ^ ((b >> 31) & 0x7fffffff)


cdef inline int32_t top_of_block(const float *v, int32_t *low) noexcept nogil:
    # The largest of BLOCK keys; *low becomes their smallest if that is smaller.
    cdef int i
    cdef int32_t k, top = KEY_LOW, least = low[0]
    for i in range(BLOCK):
        k = key_of(v[i])
        top = k if k > top else top
        least = k if k < least else least
    low[0] = least
    return top


cdef int find_tops(const float *v, int n, int32_t *tops) noexcept nogil:
    # tops[b] = the largest key of a block of v[0..n); returns the first index of NaN or +inf, or -1.
    cdef int i = 0
    cdef int32_t k, top, high = KEY_LOW, low = 0
    while i + BLOCK <= n:
        top = top_of_block(v + i, &low)
        high = top if top > high else high
        tops[i // BLOCK] = top
        i += BLOCK
    if i < n:
        top = KEY_LOW
        while i < n:
            k = key_of(v[i])
            top = k if k > top else top
            low = k if k < low else low
            i += 1
        high = top if top > high else high
        tops[n // BLOCK] = top
    if high < KEY_INF and low >= KEY_LOW:
        return -1
    i = 0
    while not isnan(v[i]) and v[i] != INFINITY:
        i += 1
    return i


cdef void sort_best_first(const float *v, int32_t *heap, int n) noexcept nogil:
    cdef int i
    cdef int32_t t
    for i in range(n - 1, 0, -1):
        t = heap[0]
        heap[0] = heap[i]
        heap[i] = t
        sift_down(v, heap, i, 0)


cdef void make_heap(const float *v, int32_t *ids, int n) noexcept nogil:
    cdef int i
    for i in range(n // 2 - 1, -1, -1):
        sift_down(v, ids, n, i)


cdef void select_top(const float *v, const int32_t *tops, int n, int k, int32_t *ids) noexcept nogil:
    # ids[0..k) = the k best of v[0..n), best first; equal values by increasing id.  tops[b] is no
    # less than the keys of block b.
    cdef int i, end
    for i in range(k):
        ids[i] = i
    make_heap(v, ids, k)
    i = k
    while i < n:
        end = (i // BLOCK + 1) * BLOCK
        end = end if end < n else n
        if tops[i // BLOCK] > key_of(v[ids[0]]):
            while i < end:
                if better(v, i, ids[0]):
                    ids[0] = i
                    sift_down(v, ids, k, 0)
                i += 1
        i = end
    sort_best_first(v, ids, k)


cdef class Sampler:
    """Draws token ids for one sequence; holds its generator and the counts for penalties.

    Parameters
    ----------
    n_vocab : int
        Length of a row of logits.
    n_vocab_used : int
        Ids at or above it are padding of the embedding table and never drawn.
    temperature : float
        0 is greedy.
    top_k : int
        0 is off.
    top_p, min_p : float
        1 and 0 are off.
    repetition_penalty : float
        Of ids in the prompt or the output (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
    presence_penalty, frequency_penalty : float
        Of ids in the output, subtracted once and once per occurrence.
    logit_bias : dict of int to float
        Added to the logits; -inf forbids an id.
    seed : int
        0 <= seed < 2**64.
    """

    cdef readonly int n_vocab
    cdef readonly int n_vocab_used
    cdef readonly uint64_t seed
    cdef double temperature, top_p, min_p, repetition, presence, frequency
    cdef int top_k
    cdef uint64_t state[4]
    cdef int n_seen, n_bias
    cdef const float *row   # [n_vocab_used] logits after bias and penalties: work, or the caller's
    cdef float *work        # [n_vocab_used]
    cdef int32_t *tops      # [n_vocab_used / BLOCK, rounded up] no key of row's block is larger
    cdef int32_t *ids       # [n_vocab_used] candidates
    cdef double *weights    # [n_vocab_used] unnormalised probabilities of the candidates
    cdef int32_t *seen      # [n_vocab_used] distinct ids of prompt and output, n_seen of them
    cdef uint8_t *is_seen   # [n_vocab_used]
    cdef int32_t *counts    # [n_vocab_used] occurrences in the output
    cdef int32_t *bias_ids
    cdef float *bias

    def __cinit__(self, int n_vocab, int n_vocab_used, *, double temperature, int top_k, double top_p,
                  double min_p, double repetition_penalty, double presence_penalty,
                  double frequency_penalty, dict logit_bias, uint64_t seed):
        if not 0 < n_vocab_used <= n_vocab:
            raise ArgumentError(f"n_vocab_used {n_vocab_used} must be in 1..{n_vocab}")
        self.n_vocab = n_vocab
        self.n_vocab_used = n_vocab_used
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition = repetition_penalty
        self.presence = presence_penalty
        self.frequency = frequency_penalty
        cdef size_t n = <size_t>n_vocab_used
        self.work = <float *>malloc(n * sizeof(float))
        self.tops = <int32_t *>malloc((n // BLOCK + 1) * sizeof(int32_t))
        self.ids = <int32_t *>malloc(n * sizeof(int32_t))
        self.weights = <double *>malloc(n * sizeof(double))
        self.seen = <int32_t *>malloc(n * sizeof(int32_t))
        self.is_seen = <uint8_t *>calloc(n, 1)
        self.counts = <int32_t *>calloc(n, sizeof(int32_t))
        self.n_bias = <int>len(logit_bias)
        self.bias_ids = <int32_t *>malloc((self.n_bias + 1) * sizeof(int32_t))
        self.bias = <float *>malloc((self.n_bias + 1) * sizeof(float))
        if (self.work == NULL or self.tops == NULL or self.ids == NULL or self.weights == NULL
                or self.seen == NULL or self.is_seen == NULL or self.counts == NULL
                or self.bias_ids == NULL or self.bias == NULL):
            raise MemoryError()
        cdef int i = 0
        for key, value in sorted(logit_bias.items()):
            self._check_id(key)
            self.bias_ids[i] = key
            self.bias[i] = value
            i += 1
        self.reseed(seed)

    def __dealloc__(self):
        free(self.work)
        free(self.tops)
        free(self.ids)
        free(self.weights)
        free(self.seen)
        free(self.is_seen)
        free(self.counts)
        free(self.bias_ids)
        free(self.bias)

    def reseed(self, uint64_t seed):
        """Start the generator again from `seed`."""
        cdef uint64_t x = seed
        self.seed = seed
        for i in range(4):
            self.state[i] = splitmix64(&x)

    def random(self):
        """Return the next uniform number in [0, 1)."""
        return self._uniform()

    def observe_prompt(self, ids):
        """Count the prompt's ids for the repetition penalty; ids of padding are ignored."""
        for i in ids:
            if 0 <= i < self.n_vocab_used:
                self._see(i)

    def accept(self, int id):
        """Count an id that became part of the output."""
        self._check_id(id)
        self._see(id)
        self.counts[id] += 1

    def sample(self, const float[::1] logits):
        """Return the id drawn from one row of logits.

        Parameters
        ----------
        logits : ndarray of shape (n_vocab,), float32
            Not modified.

        Raises
        ------
        StateError
            NaN or +inf among the logits, or every id forbidden.
        """
        cdef int n
        self._load(logits)
        if self.temperature == 0.0:
            with nogil:
                select_top(self.row, self.tops, self.n_vocab_used, 1, self.ids)
            if self.row[self.ids[0]] == -INFINITY:
                raise StateError("no token is allowed: every logit is -inf")
            return self.ids[0]
        n = self._candidates()
        cdef double total = 0, cum = 0, u = self._uniform()
        cdef int i
        for i in range(n):
            total += self.weights[i]
        u *= total
        for i in range(n):
            cum += self.weights[i]
            if cum > u:
                return self.ids[i]
        while n > 1 and self.weights[n - 1] == 0.0:  # rounding left u at the total
            n -= 1
        return self.ids[n - 1]

    def distribution(self, const float[::1] logits):
        """Return the ids that can be drawn and their probabilities; the generator does not move.

        Returns
        -------
        ids : ndarray of shape (n,), int32
        probs : ndarray of shape (n,), float64
            Sums to 1.
        """
        cdef int i, n = 1
        self._load(logits)
        if self.temperature == 0.0:
            select_top(self.row, self.tops, self.n_vocab_used, 1, self.ids)
            self.weights[0] = 1.0
        else:
            n = self._candidates()
        ids = np.empty(n, dtype=np.int32)
        probs = np.empty(n, dtype=np.float64)
        cdef int32_t[::1] ids_view = ids
        cdef double[::1] probs_view = probs
        for i in range(n):
            ids_view[i] = self.ids[i]
            probs_view[i] = self.weights[i]
        return ids, probs / probs.sum()

    def logprobs(self, const float[::1] logits, int id, int n):
        """Return log p of `id` and of the `n` most probable ids, by the model's own distribution.

        Bias, penalties, temperature and cuts do not enter; padding ids do not count.

        Returns
        -------
        logprob : float
        ids : ndarray of shape (n,), int32
        logprobs : ndarray of shape (n,), float64
        """
        self._check_id(id)
        self._load_row(logits)
        cdef int i, k = min(max(n, 0), self.n_vocab_used)
        cdef double biggest, total = 0, log_total
        cdef const float *v = self.row
        with nogil:
            select_top(v, self.tops, self.n_vocab_used, k if k > 0 else 1, self.ids)
            biggest = v[self.ids[0]]
            for i in range(self.n_vocab_used):
                total += exp(v[i] - biggest)
        log_total = biggest + log(total)
        ids = np.array([self.ids[i] for i in range(k)], dtype=np.int32)
        values = np.array([v[self.ids[i]] - log_total for i in range(k)], dtype=np.float64)
        return v[id] - log_total, ids, values

    cdef double _uniform(self) noexcept nogil:
        return <double>(xoshiro256ss(self.state) >> 11) * (1.0 / 9007199254740992.0)

    cdef int _check_id(self, id) except -1:
        if not 0 <= id < self.n_vocab_used:
            raise ArgumentError(f"token id {id} is not in 0..{self.n_vocab_used - 1}")
        return 0

    cdef void _see(self, int id) noexcept:
        if not self.is_seen[id]:
            self.is_seen[id] = 1
            self.seen[self.n_seen] = id
            self.n_seen += 1

    cdef int _load_row(self, const float[::1] logits) except -1:
        # row and tops, unchanged.
        cdef int bad
        if logits.shape[0] != self.n_vocab:
            raise ArgumentError(f"a row of {logits.shape[0]} logits, the vocabulary has {self.n_vocab}")
        self.row = &logits[0]
        with nogil:
            bad = find_tops(self.row, self.n_vocab_used, self.tops)
        if bad >= 0:
            raise StateError(f"the logit of token {bad} is {logits[bad]}; nothing can be sampled")
        return 0

    cdef void _change(self, int32_t t, float x) noexcept nogil:
        self.work[t] = x
        if key_of(x) > self.tops[t // BLOCK]:
            self.tops[t // BLOCK] = key_of(x)

    cdef int _load(self, const float[::1] logits) except -1:
        cdef int i
        cdef int32_t t
        cdef float x
        cdef bint punished = self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0
        self._load_row(logits)
        if self.n_bias == 0 and not (punished and self.n_seen > 0):
            return 0
        with nogil:
            memcpy(self.work, self.row, <size_t>self.n_vocab_used * sizeof(float))
            self.row = self.work
            for i in range(self.n_bias):
                t = self.bias_ids[i]
                self._change(t, self.work[t] + self.bias[i])
            for i in range(self.n_seen if punished else 0):
                t = self.seen[i]
                x = self.work[t]
                x = <float>(x / self.repetition if x > 0 else x * self.repetition)
                if self.counts[t] > 0:
                    x -= <float>(self.presence + self.frequency * self.counts[t])
                self._change(t, x)
        return 0

    cdef int _candidates(self) except -1:
        # ids[0..n) and weights[0..n): what may be drawn, weights relative to the best id's 1.
        cdef int i, m, n = self.n_vocab_used
        cdef int limit = self.top_k if 0 < self.top_k < n else n
        cdef double biggest, total = 0, cum = 0
        cdef bint any_order = limit == n and self.top_p >= 1.0
        with nogil:
            select_top(self.row, self.tops, n, 1, self.ids)
        biggest = self.row[self.ids[0]]
        if biggest == -INFINITY:
            raise StateError("no token is allowed: every logit is -inf")
        with nogil:
            if any_order:
                m = 0
                for i in range(n):
                    cum = exp((self.row[i] - biggest) / self.temperature)
                    if cum >= self.min_p and cum > 0.0:
                        self.ids[m] = i
                        self.weights[m] = cum
                        m += 1
                return m
            if limit == n:
                m = self._nucleus(biggest, &total)
            else:
                m = limit
                select_top(self.row, self.tops, n, m, self.ids)
            for i in range(m):
                self.weights[i] = exp((self.row[self.ids[i]] - biggest) / self.temperature)
            if limit < n:
                for i in range(m):
                    total += self.weights[i]
            for i in range(m):
                cum += self.weights[i]
                if cum >= self.top_p * total:
                    m = i + 1
                    break
            while m > 1 and (self.weights[m - 1] < self.min_p or self.weights[m - 1] == 0.0):
                m -= 1
        return m

    cdef int _nucleus(self, double biggest, double *total) noexcept nogil:
        # ids[0..m): the best, best first, with at least top_p of the mass, whose sum is *total.
        cdef int i, bin, m = 0, end = 0
        cdef double below, weight, reached = 0, mass[BINS]
        total[0] = 0
        for i in range(BINS):
            mass[i] = 0
        for i in range(self.n_vocab_used):
            below = (biggest - self.row[i]) / self.temperature
            weight = exp(-below)
            mass[self._bin(below)] += weight
            total[0] += weight
        # sorted and summed again it is rounded otherwise, by far less than this margin
        while end < BINS and reached < (self.top_p + 1e-9) * total[0]:
            reached += mass[end]
            end += 1
        for i in range(self.n_vocab_used):
            if self._bin((biggest - self.row[i]) / self.temperature) < end:
                self.ids[m] = i
                m += 1
        make_heap(self.row, self.ids, m)
        sort_best_first(self.row, self.ids, m)
        return m

    cdef inline int _bin(self, double below) noexcept nogil:
        return <int>(below * PER_NAT) if below * PER_NAT < BINS else BINS - 1
