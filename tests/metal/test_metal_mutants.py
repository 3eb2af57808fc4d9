"""Planted kernel mistakes: each must be caught by the ordinary kernel tests in some mode.

A mutant is (file, text, replacement, occurrence, tests, selection).  Modes are tried from the
cheapest on until one fails; a mutant that passes them all means that the tests have a hole.
"""

import shutil

import hostlib
import mslc
import pytest
from conftest import HERE, in_child, reports, run_tests, sanitizer_env

MAT, OPS, MIX = (f"test_metal_{n}.py" for n in ("mat", "ops", "mixers"))
MODES = [("", ""), ("", "rand7"), ("address", ""), ("thread", ""), ("undefined", "")]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTANTS = {
    # matvec
    "block words": ("matvec.metal", "b * FC_FORMAT * 4", "b * 16", 0, MAT, "formats"),
    "code mask": ("common.h", "(1u << FC_FORMAT) - 1", "(1u << FC_FORMAT) - 2", 1, MAT, "formats"),
    "code crosses word": ("common.h", "w[bit / 32 + 1] <<", "w[bit / 32] <<", 0, MAT, "formats"),
    "bf16 shift": ("common.h", "as_type<float>(bits << 16)", "as_type<float>(bits << 15)", 0, MAT, "formats"),
    "group of block": ("matvec.metal", "b * 32 / FC_GROUP", "b * 32 / FC_GROUP + 1", 0, MAT, "groups"),
    "second half group": ("matvec.metal", "+ off, FC_SCALE, h)", "+ off, FC_SCALE, 0)", 0, MAT, "groups"),
    "second half word": ("matvec.metal", "w[c / step]", "w[0]", 0, MAT, "formats"),
    "bits of a half": ("matvec.metal", "bit < 8 ? w", "bit < 9 ? w", 0, MAT, "formats"),
    "scale of a column": ("matvec.metal", "0.25f, 0.0625f", "0.0625f, 0.25f", 0, MAT, "formats"),
    "rows of a pair": ("matvec.metal", "pick(odd, b, a)", "pick(odd, a, b)", 0, MAT, "formats"),
    "sum of scaled columns": ("matvec.metal", "s += t;", "s += f;", 0, MAT, "formats"),
    "sum of 16 columns": ("matvec.metal", "? x.sum[h] :", "? x.sum[0] :", 0, MAT, "groups"),
    "bias term": ("matvec.metal", "x.sum[0] + x.sum[1]", "x.sum[0] - x.sum[1]", 0, MAT, "formats"),
    "last row clamp": ("matvec.metal", "min(first, it.n_out - 1)", "ulong(first)", 0, MAT, "formats"),
    "later row clamp": ("matvec.metal", "min(FC_GATED ? i : 2 * i + side, rows.last)", "uint(FC_GATED ? i : 2 * i + side)", 0, MAT, "formats"),
    "odd pair": ("matvec.metal", "load_blocks(w, min(i + 3, a.pairs - 1)", "load_blocks(w, min(i + 2, a.pairs - 1)", 0, MAT, "tiles_of_x"),
    "even pair": ("matvec.metal", "load_blocks(w, min(i + 2, a.pairs - 2)", "load_blocks(w, min(i + 1, a.pairs - 2)", 0, MAT, "tiles_of_x"),
    "second tile forgets": ("matvec.metal", "more ? part[2 * i + lane] + v : v", "v", 0, MAT, "tiles_of_x"),
    "slices unsummed": ("matvec.metal", "p += 2 * a.pairs) {", "p += 0) {", 0, MAT, "tiles_of_x"),
    "parts before use": ("matvec.metal", BARRIER, "", 2, MAT, "tiles_of_x"),
    "long forgotten": ("matvec.metal", "while (FC_LONG && b0 <= last)", "while (false)", 0, MAT, "tiles_of_x"),
    "team of a part": ("matvec.metal", "parts + o / n_mine * a.slices", "parts + o / n_mine", 0, MAT, "tiles_of_x"),
    "tile before use": ("matvec.metal", BARRIER, "", 1, MAT, "tiles_of_x"),
    "tile used up": ("matvec.metal", BARRIER, "", 0, MAT, "tiles_of_x"),
    "zeros past x": ("matvec.metal", "i < n_cols / 4 ? load_x4(x + 4 * i) : float4(0.0f)", "load_x4(x + 4 * min(i, n_cols / 4 - 1))", 0, MAT, "tiles_of_x"),
    "block past the end": ("matvec.metal", "b = min(mine, last)", "b = mine", 0, MAT, "tiles_of_x or formats"),
    "tile of x": ("matvec.metal", "a.n_cols, b0, a.slices * FM_WIDTH, sg", "a.n_cols, 0, a.slices * FM_WIDTH, sg", 0, MAT, "tiles_of_x"),
    "place in the tile": ("matvec.metal", "mine % TILE_BLOCKS", "(mine - b0) % TILE_BLOCKS", 0, MAT, "tiles_of_x"),
    "row past the end": ("matvec.metal", "if (at < n_out)", "if (at <= n_out)", 0, MAT, "plain_odd or formats"),
    "gather": ("matvec.metal", "rows[it.row0 + t]", "rows[t]", 0, MAT, "items"),
    "gate and up": ("matvec.metal", "silu(v) * (up * result_scale())", "v * silu(up * result_scale())", 0, MAT, "gated"),
    "tail columns": ("matvec.metal", "n - n % 4 + lane),", "n - n % 4),", 0, MAT, "plain_odd"),
    "tail bound": ("matvec.metal", "c + 4 <= n", "c <= n", 0, MAT, "plain_odd"),
    "embed row": ("matvec.metal", "at.y >= a.n)", "at.y > a.n)", 0, MAT, "embed"),
    # matunits
    "units: shift": ("matunits.metal", "w >> (shift - 4)", "w >> shift", 0, MAT, "units_groups"),
    "units: place of a code": ("matunits.metal", "(127 - place)", "(128 - place)", 0, MAT, "units_groups"),
    "units: low part": ("matunits.metal", "half2(v - float2(high[k]))", "half2(v)", 0, MAT, "units_groups"),
    "units: second column": ("units.h", "half2(high.y, low.y)", "half2(high.x, low.y)", 0, MAT, "units_groups"),
    "units: others' columns": ("matunits.metal", "row / 2 == quad", "row / 2 >= quad", 0, MAT, "units_groups"),
    "units: sum of a group": ("matunits.metal", "m < per; m *= 2", "m < per / 2; m *= 2", 0, MAT, "units_groups"),
    "units: scale of a part": ("matunits.metal", "mu_value(t.scale[0], k)", "mu_value(t.scale[0], 0)", 0, MAT, "units_groups"),
    "units: half of a word": ("matunits.metal", "w[k / 2] >> (k % 2 * 16)", "w[k / 2] >> 16", 0, MAT, "units_groups"),
    "units: words of a part": ("matunits.metal", "i < (k + 1) * words", "i < 8", 0, MAT, "units_groups"),
    "units: others' zeros": ("matunits.metal", "if (own)", "if (true)", 0, MAT, "units_groups"),
    "units: step of a scale": ("matunits.metal", "inverses[at * mu_lane() / MU_STEP]", "inverses[slice]", 0, MAT, "units_range"),
    "units: second row": ("matunits.metal", "FC_GATED ? 0 : 8 * h", "0", 0, MAT, "units_sizes"),
    "units: last row": ("matunits.metal", "min(row[h] + o.step, o.last)", "row[h] + o.step", 0, MAT, "units_sizes"),
    "units: past the columns": ("matunits.metal", "min(column, a.n_cols - mu_lane())", "column", 0, MAT, "units_sizes"),
    "units: next pass": ("matunits.metal", "min(o.column + columns,", "min(o.column + MU_STEP,", 0, MAT, "units_widest"),
    "units: back to the first": ("matunits.metal", "8 * FC_FORMAT) - n * long(a.codes_stride)", "8 * FC_FORMAT)", 0, MAT, "units_widest"),
    "units: x of a pass": ("matunits.metal", "n = 0, slice += n_side", "n = 0", 0, MAT, "units_widest"),
    "units: first of a team": ("matunits.metal", "first + team * of_tile + row", "first + row", 0, MAT, "units_sizes"),
    "units: tiles of a team": ("matunits.metal", "n_teams - 1 - team) / n_teams", "n_teams - 1) / n_teams", 0, MAT, "units_sizes"),
    "units: place of a team": ("matunits.metal", "n * n_teams + team) * 16", "n + team) * 16", 0, MAT, "units_sizes"),
    "units: zeros past x": ("matunits.metal", "if (c < a.n_cols)", "if (true)", 0, MAT, "units_sizes"),
    "units: scale of x": ("matunits.metal", "270 - (top >> 23)", "250 - (top >> 23)", 0, MAT, "units_range"),
    "units: largest scale": ("matunits.metal", ", 253u)", ", 255u)", 0, MAT, "units_range"),
    "units: words before use": ("matunits.metal", BARRIER, "", 0, MAT, "units_sizes"),
    "units: parts before use": ("matunits.metal", BARRIER, "", 1, MAT, "units_sizes"),
    "units: gather": ("matunits.metal", "rows[it.row0 + t]", "rows[t]", 0, MAT, "units_items"),
    "units: a job without rows": ("matunits.metal", "(t < it.n) &", "", 0, MAT, "units_items"),
    "units: add": ("matunits.metal", "add ? *y + v : v", "v", 0, MAT, "units_items"),
    # matmul
    "ragged zero": ("matmul.metal", "if (i >= it.n) {", "if (i > it.n) {", 0, MAT, "ragged"),
    "barrier after load": ("matmul.metal", BARRIER, "", 0, MAT, "formats or ragged"),
    "barrier before load": ("matmul.metal", BARRIER, "", 1, MAT, "formats or ragged"),
    "tile corner": ("matmul.metal", "sg % 2 * 16", "sg % 2 * 8", 0, MAT, "formats"),
    "transpose": ("matmul.metal", "LD_TILE, ulong2(0, 0), true", "LD_TILE, ulong2(0, 0), false", 0, MAT, "ragged"),
    "add in matmul": ("matmul.metal", "it.add ? *y + v : v", "v", 0, MAT, "items"),
    # rows
    "norm eps": ("rows.metal", "float(a.n_cols) + a.eps", "float(a.n_cols + a.eps)", 0, OPS, "rms_norm"),
    "norm barrier": ("rows.metal", BARRIER, "", 0, OPS, "rms_norm"),
    "rotary pair": ("rows.metal", "p[a.half_rot] = hi * f.x + lo * f.y", "p[a.half_rot] = hi * f.x - lo * f.y", 0, OPS, "rotary"),
    "combine order": ("rows.metal", "part[ulong(index[e])", "part[ulong(e)", 0, OPS, "combine"),
    "nonfinite mask": ("rows.metal", "& 0x7f800000u)", "& 0x7fffffffu)", 0, OPS, "nonfinite"),
    # attention
    "kv head": ("attention.metal", "h / (a.n_heads / a.n_kv_heads)", "h % a.n_kv_heads", 0, MIX, "attend_rows"),
    "softmax shrink": ("attention.metal", "fma(sum, shrink, weight)", "sum + weight", 0, MIX, "attend_rows"),
    "merge": ("attention.metal", "exp(tops[s] - all_top), all_sum", "1.0f, all_sum", 0, MIX, "attend_rows"),
    "causal": ("attention.metal", "p0 + ki <= my_pos", "p0 + ki < my_pos + 2", 0, MIX, "attend_tiles"),
    "value barrier": ("attention.metal", BARRIER, "", 3, MIX, "attend_tiles"),
    "weights barrier": ("attention.metal", BARRIER, "", 4, MIX, "attend_tiles"),
    "query bound": ("attention.metal", "f < n_flat ?", "f <= n_flat ?", 0, MIX, "attend_tiles"),
    # delta
    "conv tap": ("delta.metal", "w[c * a.kern + j]", "w[c * a.kern + a.kern - 1 - j]", 0, MIX, "conv"),
    "conv state": ("delta.metal", "hist[(a.n + j) * a.n_ch + c]", "hist[j * a.n_ch + c]", 0, MIX, "conv"),
    "decay after": ("delta.metal", "s[i] *= alpha; // decay first", "(void)alpha;", 0, MIX, "test_delta and step"),
    "read before": ("delta.metal", "o = fma(qs[row0 + i], s[i], o);", "o = fma(qs[row0 + i], s[i] - ks[row0 + i] * d, o);", 0, MIX, "test_delta and step"),
    "step barrier": ("delta.metal", BARRIER, "", 0, MIX, "test_delta and step"),
    "step barrier 2": ("delta.metal", BARRIER, "", 1, MIX, "test_delta and step"),
    "key head": ("delta.metal", "h / (a.n_v_heads / a.n_k_heads)", "h % a.n_k_heads", 0, MIX, "test_delta and step"),
    "solve": ("delta.metal", "fma(-kk[i][j]", "fma(kk[i][j]", 0, MIX, "test_delta and chunk"),
    "chunk barrier": ("delta.metal", BARRIER, "", 5, MIX, "test_delta and chunk"),
    "chunk barrier 2": ("delta.metal", BARRIER, "", 7, MIX, "test_delta and chunk"),
    "chunk decay": ("delta.metal", "exp(last - decay[i])", "exp(last)", 0, MIX, "test_delta and chunk"),
    "norm before gate": ("delta.metal", "s = fma(o[i], o[i], s);", "s = fma(o[i], zr[i], s);", 0, MIX, "test_delta"),
    # topk
    "tie rule": ("topk.metal", "keys[e] > key", "keys[e] >= key", 0, OPS, "route"),
    "minus zero": ("topk.metal", "return 0x80000000u; // -0", "return bits; // -0", 0, OPS, "route"),
    "renormalise": ("topk.metal", "sum + a.eps", "1.0f", 0, OPS, "route"),
    "valid ids": ("topk.metal", "c < a.n_valid", "c < a.n_cols", 0, OPS, "argmax"),
}  # fmt: skip


BACK, HOST, LATER = "test_metal_backend.py", "test_metal_host.py", "test_metal_later.py"
LATE, PROTECT = "FAKE_METAL_LATE", "FAKE_METAL_PROTECT"
DEV, ENC, ENC_MAT, ENC_MIX = (
    f"metal_{n}.m" for n in ("device", "encode", "encode_mat", "encode_mix")
)

LATE_FILE = "metal_later.m"

HOST_MUTANTS = {
    "forgotten wait": (ENC, "FM_TRY(fm_metal_sync(m));", "fm_metal_flush(m);", 0, BACK, "nonfinite"),
    "swapped buffers": (ENC, "bind(&c, 0, gate, n * 4", "bind(&c, 0, up, n * 4", 0, BACK, "one_command"),
    "wrong offset": (DEV, "out->offset = m->ring_used;", "out->offset = 0;", 0, BACK, "attention or experts"),
    "shared scales anywhere": (ENC_MAT, "kind->c.v[FM_FC_VEC] > shared", "kind->c.v[FM_FC_VEC] > 0", 0, BACK, "units_matmul"),
    "wrong address": (DEV, "[b->buffer gpuAddress] +", "[b->buffer gpuAddress] + 4 +", 0, BACK, "test_matmul"),
    "undeclared resource": (DEV, "b->used_in != m->encoder_number", "false", 0, BACK, "test_matmul"),
    "declared once for ever": (DEV, "m->encoder_number++;", "m->encoder_number = 1;", 0, BACK, "route or mixed"),
    "ring not advanced": (DEV, "m->ring_used += need;", "", 0, BACK, "mixed or experts"),
    "ids one short": (ENC_MAT, "memcpy(host, ids, (size_t)n * 4);", "memcpy(host, ids, (size_t)n * 4 - 4);", 0, BACK, "embed"),
    "grid rounded down": (ENC_MAT, "(a->most_out + per - 1) / per", "a->most_out / per", 0, BACK, "test_matmul"),
    "row list of down": (ENC_MAT, "(fm_u32)job->out0 : r->row0[j]", "r->row0[j] : (fm_u32)job->out0", 0, BACK, "test_experts"),
    "kind of up": (ENC_MAT, "p == PHASE_UP ? &first->up : &first->gate, &kind", "&first->gate, &kind", 0, BACK, "three_formats"),
    "slices by rows": (ENC_MAT, "p.slices = blocks < FM_MV_SLICES ? blocks : FM_MV_SLICES;", "p.slices = n_pairs < 64 && blocks > 1 ? 2 : blocks < FM_MV_SLICES ? blocks : FM_MV_SLICES;", 0, BACK, "slices"),
    "long unset": (ENC_MAT, "> FM_MV_SLICES * FM_WIDTH * 32;", "> FM_MV_SLICES * FM_WIDTH * 64;", 0, BACK, "slices"),
    "kinds merged": (ENC_MAT, "a->n_cols == b->n_cols &&", "true ||", 0, BACK, "mixed"),
    "bias dropped": (ENC_MAT, "t.has_bias = it->bias != NULL;", "", 0, BACK, "mixed"),
    "add dropped": (ENC_MAT, "t.add = it->add;", "", 0, BACK, "mixed"),
    "scale formats": (ENC_MAT, "[FM_QUANT_F16] = FM_FMT_F16", "[FM_QUANT_F16] = FM_FMT_BF16", 0, BACK, "test_matmul"),
    "own position unseen": (ENC_MIX, "(fm_u32)(sp->pos0 + t + 1)", "(fm_u32)(sp->pos0 + t)", 0, BACK, "attention"),
    "first span's state": (ENC_MIX, "a->hist_out[s], hist", "a->hist_out[0], hist", 0, BACK, "conv"),
    "delta state in place": (ENC_MIX, "FM_TRY(delta_core(&d, batch->S_in[s], batch->S_out[s]));", "FM_TRY(delta_core(&d, batch->S_in[0], batch->S_out[s]));", 0, BACK, "conv"),
    "second span's rows": (ENC_MIX, "a->qkv + sp->row0 * a->ld_qkv", "a->qkv", 0, BACK, "conv"),
    "rope position": (ENC, "(double)(sp->pos0 + t)", "(double)t", 0, BACK, "attention"),
    "strides swapped": (ENC, "(fm_u32)ldx, (fm_u32)ldy, eps", "(fm_u32)ldy, (fm_u32)ldx, eps", 0, BACK, "rmsnorm"),
    "topk_group": (ENC, "a->topk_group > 1 ? a->topk_group : 1", "1", 0, BACK, "route"),
    "ring chunk leak": (DEV, "[chunk release];", "", 0, BACK, "attention"),
    "buffer leak": (DEV, "[b.buffer release];", "", 0, BACK, "nonfinite"),
    "pipeline leak": ("metal_pipeline.m", "[m->pipelines[i].state release];", "", 0, BACK, "nonfinite"),
    "command buffer leak": (DEV, "[m->commands release];\n    m->commands = nil;\n    m->counters", "m->commands = nil;\n    m->counters", 0, HOST, "leaks"),
    "failure unseen": (DEV, "[commands status] != MTLCommandBufferStatusCompleted", "false", 0, HOST, "failed"),
    "free without wait": (DEV, "(void)fm_metal_sync(m); /* nothing", "(void)m; /* nothing", 0, HOST, "free_waits"),
    "limit ignored": (DEV, "m->bytes + whole > m->max_bytes", "whole > m->max_bytes", 0, HOST, "limits"),
    "free not counted": (DEV, "m->bytes -= b.bytes;", "", 0, HOST, "limits"),
    "range ignored": (DEV, "bytes <= b->bytes - at", "true", 0, HOST, "foreign"),
    "wait for ever": (DEV, "if (dispatch_semaphore_wait(m->done, until) != 0) {", "if (dispatch_semaphore_wait(m->done, DISPATCH_TIME_FOREVER) != 0) {", 0, HOST, "hung"),
    # events, and experts named while the device waits
    "hold forgotten": (DEV, "[m->commands encodeWaitForEvent:m->ready value:*value];", "", 0, LATER, "later_equals"),
    "tell before its work": (DEV, "    end_encoder(m);\n    *value = ++m->told_value;\n    [m->commands encodeSignalEvent:m->told value:*value];", "    *value = ++m->told_value;\n    [m->commands encodeSignalEvent:m->told value:*value];\n    end_encoder(m);", 0, LATER, "later_equals"),
    "one hold for all": (DEV, "*value = ++m->ready_value;", "*value = m->ready_value = 1;", 0, LATER, "later_equals"),
    "wrong event": (DEV, "encodeWaitForEvent:m->ready", "encodeWaitForEvent:m->told", 0, LATER, "later_equals"),
    "wrong event value": (DEV, "encodeWaitForEvent:m->ready value:*value", "encodeWaitForEvent:m->ready value:*value - 1", 0, LATER, "later_equals"),
    "host does not wait": (DEV, "if ([m->told waitUntilSignaledValue:value timeoutMS:AWAIT_STEP_MS])", "if (true)", 0, LATER, "later_equals or failed"),
    "failure unseen by await": (DEV, "if (last && [last status] >= MTLCommandBufferStatusCompleted &&", "if (last && [last status] >= MTLCommandBufferStatusError + 1 &&", 0, LATER, "failed_device or nobody"),
    "post falls": (DEV, "if (value <= m->posted) /* values only rise */\n        return;", "", 0, LATER, "no_jobs"),
    "slots undeclared": (LATE_FILE, "FM_TRY(fm_metal_declare_slots(r.m));", "", 0, LATER, "later_equals"),
    "only one slot buffer": (DEV, "m->buffers[i].usage == FM_USAGE_SLOTS", "i == 0", 0, LATER, "later_equals"),
    "table not cleared": (LATE_FILE, "memset(a->table, 0, bytes);", "memset(a->table, 1, bytes);", 0, LATER, "no_jobs"),
    "stale jobs": (LATE_FILE, "items_of(a, (list)l)[i].n = 0;", "(void)i;", 0, LATER, "later_equals or refused"),
    "rows of parts": (LATE_FILE, "memcpy(rows_of(a) + job->out0,", "memcpy(rows_of(a),", 0, LATER, "later_equals"),
    "few limit": (LATE_FILE, "job->n > fm_metal_tune.vec_rows ? MANY_GATE : FEW_GATE", "FEW_GATE", 0, LATER, "later_equals"),
    "swiglu after the few": (LATE_FILE, "if (r.fused)\n        FM_TRY(run_list(&r, FEW_GATE, r.gate));\n", "", 0, LATER, "later_equals"),
    "many cut short": (LATE_FILE, "a->n_parts / (few + 1)", "a->n_parts / (few + 12)", 0, LATER, "later_equals"),
    "alignment of gate alone": (LATE_FILE, "gate->c.v[FM_FC_BYTES] || up->c.v[FM_FC_BYTES]", "gate->c.v[FM_FC_BYTES] && up->c.v[FM_FC_BYTES]", 0, LATER, "later_equals or refused"),
    "marks elsewhere": (ENC, "fm_metal_bind_place(&c, 1, marks);", "fm_metal_bind_place(&c, 1, (fm_metal_place){marks.buffer, 0});", 0, LATER, "combine"),
}  # fmt: skip


PIPELINE = mslc.REPO / "csrc" / "model" / "pipeline.c"
EAGER = "FAKE_METAL_EAGER"
BITS, READS = "same_bits and mlx4", "same_bits and mlx4 or failed_reads"
# (text, replacement, cases, mode of the stand-in or sanitizer)
PIPELINE_MUTANTS = {
    "ids read early": ("    FM_TRY(await(m, at->routed));\n    FM_TRY(retire(m));\n    FM_PHASE", "    FM_TRY(retire(m));\n    FM_PHASE", BITS, LATE),
    "pins released early": ("    return start_stage(m, layer, p->n_stages - 1);", "    FM_TRY(start_stage(m, layer, p->n_stages - 1));\n    unpin(m);\n    return FM_OK;", BITS, LATE),
    "posted before its jobs": ("    FM_TRY(m->be->v->set_jobs(m->be, &p->later[stage], m->wave->jobs, n));\n    post(m, p->at[layer].hold[stage]);", "    post(m, p->at[layer].hold[stage]);\n    FM_TRY(m->be->v->set_jobs(m->be, &p->later[stage], m->wave->jobs, n));", BITS, EAGER),
    "posted before the lists": ("    fm_wave_parts(m, w, b->n_rows, &p->parts);\n    return start_stage(m, layer, p->n_stages - 1);", "    FM_TRY(start_stage(m, layer, p->n_stages - 1));\n    fm_wave_parts(m, w, b->n_rows, &p->parts);\n    return FM_OK;", BITS, EAGER),
    "both stages posted at once": ("post(m, p->at[layer].hold[stage]);", "post(m, p->at[layer].hold[1]);", BITS, EAGER),
    "one table": ("            .table = p->table[i],", "            .table = p->table[0],", BITS, LATE),
    "rest not waited for": ("    while (n_left > 0)\n", "    if (n_left > 0)\n", BITS, EAGER),
    "lists of the plain form": ("m->c.hidden_size, s->exp_out, p->parts.start, p->parts.index,\n                               p->parts.weight, n};", "m->c.hidden_size, s->exp_out, s->comb_start, s->comb_index,\n                               s->comb_weight, n};", BITS, EAGER),
    "held experts forgotten": ("    p->held = layer;", "    p->held = -1;", BITS, EAGER),
    "marks unseen": ("        if (p->marks[i])", "        if (p->marks[i] > 1)", "finite", EAGER),
    "last layer's marks unseen": ("    FM_TRY(s);\n    FM_TRY(retire(m));", "    FM_TRY(s);\n    unpin(m);", "finite", EAGER),
    "pins kept after an error": ("    unpin(m);\n    fm_experts_disown(m->experts);", "    fm_experts_disown(m->experts);", "fails_and_fails", EAGER),
    "device left holding": ("    m->be->v->post(m->be, p->last_hold);\n    return", "    return", READS, ""),
    "run out at once": ("    if (p->posted > 0 && next < m->c.num_hidden_layers)\n        FM_TRY(await(m, p->at[next].routed));", "", "failed_late", "thread"),
    "failure unseen": ("        why = s != FM_OK ? s : why;", "        why = s != FM_OK ? s : FM_OK;", READS, EAGER),
    "too many experts": ("experts <= fm_experts_slots(m->experts) &&", "true &&", BITS, EAGER),
}  # fmt: skip


def mutate(folder, file, text, new, occurrence, suffix="kernels"):
    shutil.copytree(mslc.REPO / "metal" / suffix, folder, ignore=shutil.ignore_patterns("kernels"))
    path = folder / file
    parts = path.read_text().split(text)
    assert len(parts) > occurrence + 1, f"{file} no longer has this text {occurrence + 1} times"
    at = occurrence + 1
    path.write_text(text.join(parts[:at]) + new + text.join(parts[at:]))


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    file, text, new, occurrence, tests, select = MUTANTS[name]
    mutate(tmp_path / "kernels", file, text, new, occurrence)
    for san, order in MODES:
        env = {"FLASHMOE_METAL_KERNELS": str(tmp_path / "kernels"), "MSL_ORDER": order}
        select_all = f"({select}) and not sanitizers"
        status, output = run_tests(san, HERE / tests, "-k", select_all, env=env)
        if status or reports(output):
            return
    pytest.fail(f"{file}: '{text}' -> '{new}' passes every mode")


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("name", HOST_MUTANTS)
def test_host_mutant_is_caught(name, tmp_path):
    file, text, new, occurrence, tests, select = HOST_MUTANTS[name]
    mutate(tmp_path / "metal", file, text, new, occurrence, ".")
    for mode in ({}, {LATE: "1"}, {PROTECT: "1"}):
        env = {"FLASHMOE_METAL_HOST": str(tmp_path / "metal"), **mode}
        child = "hung" in select or "failed" in select
        if child:  # this test is a child itself: let it start another
            env["MSL_CHILD"] = ""
        status, _ = run_tests("", HERE / tests, "-k", f"({select}) and not strict_modes", env=env)
        if status:
            return
    pytest.fail(f"{file}: '{text}' -> '{new}' passes every mode")


def mutated_pipeline(folder, name):
    text, new, *_ = PIPELINE_MUTANTS[name]
    source = PIPELINE.read_text()
    assert source.count(text) == 1, f"pipeline.c has this text {source.count(text)} times: {text}"
    (folder / "pipeline.c").write_text(source.replace(text, new))
    return folder / "pipeline.c"


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINE_MUTANTS)
def test_pipeline_mutant_is_caught(name, tmp_path, monkeypatch):
    """Mistakes in the host's turns between the device's, with the core built anew."""
    from test_metal_pipeline import CASES, run_cases  # skips where a core cannot be built

    _, _, select, mode = PIPELINE_MUTANTS[name]
    monkeypatch.setenv("FLASHMOE_METAL_PIPELINE", str(mutated_pipeline(tmp_path, name)))
    san = mode if mode in mslc.SANITIZERS else ""
    env = sanitizer_env(san) if san else {mode: "1"} if mode else {}
    env |= {"METAL_CORE_PATH": str(hostlib.build_core(san)), "FAKE_METAL_EVENT_MS": "2000"}
    status, output = run_cases(CASES, "-k", select, env=env)
    assert status or reports(output), f"planted and unnoticed: {name}"
    assert "passed" in output or "failed" in output, output[-2000:]


def test_texts_exist(tmp_path):
    """Cheap: each mutant still applies to the kernels and the host as they are."""
    for name in PIPELINE_MUTANTS:
        mutated_pipeline(tmp_path, name)
    for n, (file, text, new, occurrence, _, _) in enumerate(HOST_MUTANTS.values()):
        mutate(tmp_path / f"host{n}", file, text, new, occurrence, ".")
    for n, (file, text, new, occurrence, _, _) in enumerate(MUTANTS.values()):
        mutate(tmp_path / str(n), file, text, new, occurrence)
