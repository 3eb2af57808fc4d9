"""Expert matvec at 397B shapes on an NVIDIA GPU, against copy speed: msl_cuda.py bench DIR.

Ten experts in one dispatch, random weights, as many sets of experts in turn as keep them out of the
L2 cache. Launches are replayed from a graph, so that the host's time does not count: one after
the other, as a token has them, and over four streams, which hides what a launch costs. Each line's
`error` is the worst of some rows against float64, in units of the kernel's bound; `of_copy` compares
with a long copy, `of_same_copy` with copies of as many bytes launched in the same way.
"""

from __future__ import annotations

import ctypes as C
import itertools
import json
import os

import numpy as np
from metal_args import CONST, args, table
from msl_cuda import Args, alloc, call, function

KERNELS = {"mat_vec": "matvec", "mat_vec_units": "matunits"}  # and their files
HIDDEN, WIDTH, EXPERTS, GROUP = 4096, 1024, 10, 64
SET_BYTES = 400 << 20  # of all sets; the L2 of an H200 holds 60 MB


def bench_constants(bits, gated):
    return {"FC_FORMAT": bits, "FC_GROUP": GROUP, "FC_SCALE": 17, "FC_VEC": 1, "FC_GATED": gated}


def handles(n, create, *rest):
    made = [C.c_void_p() for _ in range(n)]
    for h in made:
        call(create, C.byref(h), *rest)
    return made


def seconds(works, streams=1, rounds=12, warm=3):
    """Median time of one of `works` (functions of a stream), launched together as a graph."""
    queues, marks = handles(streams, "cuStreamCreate", 1), handles(streams, "cuEventCreate", 2)
    begin, end = handles(2, "cuEventCreate", 0)
    graph, ready, first = C.c_void_p(), C.c_void_p(), queues[0]
    call("cuStreamBeginCapture_v2", first, 2)
    call("cuEventRecord", marks[0], first)
    for q in queues[1:]:
        call("cuStreamWaitEvent", q, marks[0], 0)
    for i, work in enumerate(works):
        work(queues[i % streams])
    for q, mark in zip(queues[1:], marks[1:]):
        call("cuEventRecord", mark, q)
        call("cuStreamWaitEvent", first, mark, 0)
    call("cuStreamEndCapture", first, C.byref(graph))
    call("cuGraphInstantiateWithFlags", C.byref(ready), graph, C.c_ulonglong(0))
    times, ms = [], C.c_float()
    for _ in range(warm + rounds):
        call("cuEventRecord", begin, first)
        call("cuGraphLaunch", ready, first)
        call("cuEventRecord", end, first)
        call("cuEventSynchronize", end)
        call("cuEventElapsedTime", C.byref(ms), begin, end)
        times.append(ms.value / 1e3 / len(works))
    call("cuGraphExecDestroy", ready)
    call("cuGraphDestroy", graph)
    return float(np.median(times[warm:]))


def kernel_work(fn, a, groups, tg):
    def work(stream):
        params = (C.c_void_p * 1)(C.cast(C.byref(a), C.c_void_p))
        call("cuLaunchKernel", fn, *groups, *tg, 0, stream, params, None)

    return work


def upload(raw, at):
    call("cuMemcpyHtoD_v2", C.c_uint64(at), raw.ctypes.data_as(C.c_void_p), C.c_size_t(raw.nbytes))
    return at


def bound(raw, a, i):
    """A struct or table for binding i."""
    a.b[i] = upload(np.frombuffer(raw, np.uint8), alloc(len(raw)))
    a.set_bytes(i, raw)


def copy_speeds(directory, sizes):
    """Bytes per second read plus written: the copy kernel and the driver's copy, long; then the copy
    kernel moving only `sizes` bytes in a launch, one launch after the other and over four streams."""
    n = 2 << 30
    src, dst = alloc(n), alloc(n)
    upload(np.random.default_rng(0).integers(0, 256, n, dtype=np.uint8), src)
    a = Args()
    a.b[0], a.b[1] = src, dst
    fn = function(str(directory), "copy", (), "copy_words")
    speeds = []

    def driver(stream):
        call("cuMemcpyDtoDAsync_v2", C.c_uint64(dst), C.c_uint64(src), C.c_size_t(n), stream)

    for work in (kernel_work(fn, a, (n // 16384, 1, 1), (256, 1, 1)), driver):
        speeds.append(2 * n / seconds([work] * 4))
    short = []
    for size in sizes:
        half, works = size // 2 // 16384 * 16384, []
        for at in range(0, SET_BYTES, half):
            a = Args()
            a.b[0], a.b[1] = src + at, dst + at
            works.append(kernel_work(fn, a, (half // 16384, 1, 1), (256, 1, 1)))
        short.append([2 * half / seconds(works, streams) for streams in (1, 4)])
    for p in (src, dst):
        call("cuMemFree_v2", C.c_uint64(p))
    return *speeds, short


def shape_bytes(bits, gated):
    """Of all experts' matrices in one dispatch."""
    return EXPERTS * (1 + gated) * HIDDEN * WIDTH * (bits * GROUP + 2 * 16) // (8 * GROUP)


class Case:
    """One dispatch's weights, in many sets, and what some rows of its result should be."""

    def __init__(self, bits, gated, rng, kernel="mat_vec"):
        self.bits, self.gated, self.matrices = bits, gated, 1 + gated
        self.n_out, self.n_cols = (WIDTH, HIDDEN) if gated else (HIDDEN, WIDTH)
        # as the host cuts these shapes: simdgroups side by side, teams of them, pairs or tiles
        if kernel == "mat_vec":
            self.slices, self.teams, self.pairs = side, _, _ = ((1, 4, 8), (4, 1, 16))[gated]
            per = self.teams * self.pairs * (2 - gated)
        else:
            self.slices, of_tile = self.n_cols * bits // 1024, 16 // self.matrices
            side = self.slices // -(-self.slices // 8)
            self.pairs = -(-self.n_out // of_tile * EXPERTS // 264)
            self.teams, per = min(-(-self.pairs // 5), 8 // side), self.pairs * of_tile
        self.threads, self.rows = (CONST["FM_WIDTH"] * side, self.teams, 1), per
        self.codes, self.scales = self.n_cols * bits // 8, self.n_cols // GROUP * 2
        self.matrix = self.n_out * (self.codes + 2 * self.scales)
        self.bytes = self.matrix * self.matrices * EXPERTS
        self.x = rng.standard_normal((EXPERTS, self.n_cols)).astype(np.float32)
        self.y = alloc(4 * EXPERTS * self.n_out)
        self.host = rng.integers(0, 256, self.bytes, dtype=np.uint8)
        for m in range(EXPERTS * self.matrices):
            codes, scales, biases = self.areas(m)
            s = rng.uniform(0.5, 2, len(scales)) * rng.choice([-1, 1], len(scales)) / (1 << bits)
            b = -s * (1 << bits) * rng.uniform(0.3, 0.7, len(s))
            for area, v in ((scales, s), (biases, b)):
                area[:] = v.astype(np.float32).view(np.uint32) >> 16
        x = upload(self.x, alloc(self.x.nbytes))
        self.memory = [alloc(self.bytes) for _ in range(-(-SET_BYTES // self.bytes))]
        self.args = [self.bind(upload(self.host, at), x) for at in self.memory]

    def areas(self, m):
        """Codes (bytes), scales and biases (bf16) of matrix m."""
        at, n, part = m * self.matrix, self.n_out * self.codes, self.n_out * self.scales
        raw = self.host[at : at + self.matrix]
        return raw[:n], raw[n : n + part].view(np.uint16), raw[n + part :].view(np.uint16)

    def bind(self, weights, x):
        items = []
        for e in range(EXPERTS):
            at = weights + e * self.matrix * self.matrices
            own = [at, at + self.n_out * self.codes, at + self.n_out * (self.codes + self.scales)]
            up = [p + self.matrix * self.gated for p in own]
            items.append(args("fm_metal_item", codes=own[0], scales=own[1], biases=own[2],
                              up_codes=up[0], up_scales=up[1], up_biases=up[2],
                              y=self.y + 4 * e * self.n_out, n_out=self.n_out, ldy=self.n_out, n=1,
                              row0=0 if self.gated else e))  # fmt: skip
        a = Args()
        bound(table(items), a, 0)
        bound(bytes(args("fm_mat_args", n_cols=self.n_cols, ldx=self.n_cols,
                         codes_stride=self.codes, scales_stride=self.scales, slices=self.slices,
                         pairs=self.pairs)), a, 1)  # fmt: skip
        a.b[2] = a.b[3] = x
        return a

    def product(self, m, x, rows):
        """W x in float64 for some rows of matrix m, and the sums of |w x|."""
        codes, *rest = self.areas(m)
        codes = codes.reshape(self.n_out, -1)[rows]
        parts = [codes >> k * self.bits & (1 << self.bits) - 1 for k in range(8 // self.bits)]
        q = np.stack(parts, -1).reshape(len(rows), -1)
        s, b = ((a.astype(np.uint32) << 16).view(np.float32).reshape(self.n_out, -1)[rows]
                for a in rest)  # fmt: skip
        w = q * np.repeat(s, GROUP, 1).astype(np.float64) + np.repeat(b, GROUP, 1)
        return w @ x, np.abs(w) @ np.abs(x)

    def error(self):
        y = np.empty((EXPERTS, self.n_out), np.float32)
        call("cuMemcpyDtoH_v2", y.ctypes.data_as(C.c_void_p), C.c_uint64(self.y),
             C.c_size_t(y.nbytes))  # fmt: skip
        rows, worst = np.r_[0:40, self.n_out - 40 : self.n_out], 0.0
        for e in (0, EXPERTS - 1):
            x = self.x[0 if self.gated else e].astype(np.float64)
            exact, size = self.product(e * self.matrices, x, rows)
            if self.gated:
                up, up_size = self.product(e * 2 + 1, x, rows)
                silu = exact / (1 + np.exp(-exact))
                exact, size = silu * up, size * (np.abs(up) + 1) + np.abs(silu) * up_size
            worst = np.max([worst, *(np.abs(y[e, rows] - exact) / size)])  # NaN stays NaN
        return float(worst * 2**20)

    def free(self):
        for p in self.memory:
            call("cuMemFree_v2", C.c_uint64(p))


def bench(directory):
    """Print one JSON line per measurement."""
    os.environ["MSL_CUDA"] = str(directory)
    cases = [(bits, gated) for bits in (4, 2) for gated in (1, 0)]
    sizes = [shape_bytes(*case) for case in cases]
    copy, driver, short = copy_speeds(directory, sizes)
    for size, speeds in zip(sizes, short):
        print(json.dumps({"copy_MB": round(size / 1e6, 1), "GBps": round(speeds[0] / 1e9),
                          "GBps_4_streams": round(speeds[1] / 1e9)}))  # fmt: skip
    print(json.dumps({"copy_kernel_GBps": round(copy / 1e9), "copy_driver_GBps": round(driver / 1e9),
                      "counted": "read + written"}))  # fmt: skip
    for kernel, (bits, gated) in itertools.product(KERNELS, cases):
        case = Case(bits, gated, np.random.default_rng(1), kernel)
        fc = tuple(sorted(bench_constants(bits, gated).items()))
        fn = function(str(directory), KERNELS[kernel], fc, kernel)
        groups, tg = (-(-case.n_out // case.rows), EXPERTS, 1), case.threads
        call("cuMemsetD8_v2", C.c_uint64(case.y), 255, C.c_size_t(4 * EXPERTS * case.n_out))
        works = [kernel_work(fn, a, groups, tg) for a in case.args]
        line = {"kernel": kernel, "bits": bits, "matrix": "gate+up" if gated else "down", "experts": EXPERTS,
                "MB": round(case.bytes / 1e6, 1), "error": 0.0}  # fmt: skip
        for name, streams in (("", 1), ("_4_streams", 4)):
            t = seconds(works, streams)
            same = short[cases.index((bits, gated))][streams > 1]
            line |= {"us" + name: round(t * 1e6, 2), "GBps" + name: round(case.bytes / t / 1e9),
                     "of_copy" + name: round(case.bytes / t / copy, 3),
                     "of_same_copy" + name: round(case.bytes / t / same, 3)}  # fmt: skip
        line["error"] = round(case.error(), 3)
        print(json.dumps(line), flush=True)
        case.free()
