// Gated DeltaNet: causal convolution, l2 norms and gates, the recurrence, the output norm.
// State S [n_v_heads, dk, dv] stays f32. Value head h reads key head h / (n_v_heads / n_k_heads).
#include "common.h"

// Depthwise convolution + SiLU over the rows of one sequence; tap kern-1 is the current row.
// hist: the kern-1 raw rows before this call, oldest first; hist_out the same after it, other
// memory. Grid: n_ch; each thread walks its channel.
kernel void conv_silu(device const float *m [[buffer(0)]],
                      device const float *w [[buffer(1)]],
                      device const float *hist [[buffer(2)]],
                      device float *hist_out [[buffer(3)]],
                      device float *y [[buffer(4)]],
                      constant fm_conv_silu_args &a [[buffer(5)]],
                      uint c [[thread_position_in_grid]]) {
    if (c >= a.n_ch)
        return;
    const uint past = a.kern - 1;
    for (uint t = 0; t < a.n; t++) {
        float s = 0.0f;
        for (uint j = 0; j < a.kern; j++) { // source row t - past + j
            const float v = t + j < past ? hist[(t + j) * a.n_ch + c]
                                         : m[ulong(t + j - past) * a.ldm + c];
            s = fma(w[c * a.kern + j], v, s);
        }
        y[ulong(t) * a.ldy + c] = silu(s);
    }
    for (uint j = 0; j < past; j++)
        hist_out[j * a.n_ch + c] = a.n + j < past ? hist[(a.n + j) * a.n_ch + c]
                                                  : m[ulong(a.n + j - past) * a.ldm + c];
}

// q and k of a row, l2-normalised (q also / sqrt(dk)), into qk [n, 2, n_k_heads, dk]; the decay
// exponent g <= 0 and beta into gates [n, 2, n_v_heads].
// Threads: FM_WIDTH. Groups: (max(n_k_heads, n_v_heads), n).
kernel void delta_prepare(device const float *qkv [[buffer(0)]],
                          device const float *a_in [[buffer(1)]],
                          device const float *b_in [[buffer(2)]],
                          device const float *a_log [[buffer(3)]],
                          device const float *dt_bias [[buffer(4)]],
                          device float *qk [[buffer(5)]],
                          device float *gates [[buffer(6)]],
                          constant fm_delta_shape &a [[buffer(7)]],
                          uint2 group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]]) {
    const uint h = group.x, t = group.y;
    if (h < a.n_k_heads) {
        for (uint part = 0; part < 2; part++) {
            device const float *x =
                qkv + ulong(t) * a.ld_qkv + (part * a.n_k_heads + h) * a.dk;
            device float *y = qk + ((ulong(t) * 2 + part) * a.n_k_heads + h) * a.dk;
            float s = 0.0f;
            for (uint i = lane; i < a.dk; i += FM_WIDTH)
                s = fma(x[i], x[i], s);
            s = simd_sum(s);
            float f = 1.0f / sqrt(s + 1e-6f); // fixed, on the sum: not rms_norm_eps
            if (part == 0)
                f /= sqrt(float(a.dk));
            for (uint i = lane; i < a.dk; i += FM_WIDTH)
                y[i] = x[i] * f;
        }
    }
    if (h < a.n_v_heads && lane == 0) {
        const float x = a_in[t * a.ld_ab + h] + dt_bias[h];
        // log1p(e) for e = exp(-|x|): log(1 + e) loses e below 2^-24, where it equals e
        const float e = exp(-abs(x));
        const float log1p_e = e < 1e-4f ? e - 0.5f * e * e : log(1.0f + e);
        gates[(ulong(t) * 2) * a.n_v_heads + h] = -exp(a_log[h]) * (max(x, 0.0f) + log1p_e);
        gates[(ulong(t) * 2 + 1) * a.n_v_heads + h] = sigmoid(b_in[t * a.ld_ab + h]);
    }
}

constant uint STEP_ROWS = FM_DELTA_MAX_DK / FM_DELTA_SIMDGROUPS; // rows of S a thread may own

// The recurrence, row by row; S stays in registers: lane = column of S, simdgroup s owns rows
// s * R .. of S, R = ceil(dk / 8). Writes o into y (not yet normed).
// Threads: FM_WIDTH * FM_DELTA_SIMDGROUPS. Groups: (dv / 32, n_v_heads).
kernel void delta_step(device const float *qk [[buffer(0)]],
                       device const float *gates [[buffer(1)]],
                       device const float *qkv [[buffer(2)]],
                       device const float *s_in [[buffer(3)]],
                       device float *s_out [[buffer(4)]],
                       device float *y [[buffer(5)]],
                       constant fm_delta_shape &a [[buffer(6)]],
                       uint2 group [[threadgroup_position_in_grid]],
                       uint tid [[thread_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]],
                       uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float qs[FM_DELTA_MAX_DK], ks[FM_DELTA_MAX_DK];
    threadgroup float part[FM_DELTA_SIMDGROUPS][FM_WIDTH], part_o[FM_DELTA_SIMDGROUPS][FM_WIDTH];
    const uint h = group.y, kh = h / (a.n_v_heads / a.n_k_heads), dk = FC_DIM;
    const uint col = group.x * FM_WIDTH + lane;
    const uint n_rows = (dk + FM_DELTA_SIMDGROUPS - 1) / FM_DELTA_SIMDGROUPS, row0 = sg * n_rows;
    const ulong head = ulong(h) * dk * a.dv;
    float s[STEP_ROWS];
#pragma unroll
    for (uint i = 0; i < STEP_ROWS; i++)
        s[i] = i < n_rows && row0 + i < dk && col < a.dv
                   ? s_in[head + ulong(row0 + i) * a.dv + col] : 0.0f;
    for (uint t = 0; t < a.n; t++) {
        device const float *q = qk + (ulong(t) * 2 * a.n_k_heads + kh) * dk;
        for (uint i = tid; i < dk; i += FM_WIDTH * FM_DELTA_SIMDGROUPS) {
            qs[i] = q[i];
            ks[i] = q[a.n_k_heads * dk + i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const float alpha = exp(gates[ulong(t) * 2 * a.n_v_heads + h]);
        const float beta = gates[(ulong(t) * 2 + 1) * a.n_v_heads + h];
        float sum = 0.0f;
#pragma unroll
        for (uint i = 0; i < STEP_ROWS; i++)
            if (i < n_rows && row0 + i < dk) {
                s[i] *= alpha; // decay first
                sum = fma(s[i], ks[row0 + i], sum);
            }
        part[sg][lane] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = 0.0f;
        for (uint i = 0; i < FM_DELTA_SIMDGROUPS; i++)
            sum += part[i][lane];
        const float v =
            col < a.dv ? qkv[ulong(t) * a.ld_qkv + 2 * a.n_k_heads * dk + h * a.dv + col] : 0.0f;
        const float d = beta * (v - sum);
        float o = 0.0f;
#pragma unroll
        for (uint i = 0; i < STEP_ROWS; i++)
            if (i < n_rows && row0 + i < dk) {
                s[i] = fma(ks[row0 + i], d, s[i]);
                o = fma(qs[row0 + i], s[i], o); // read after the update
            }
        part_o[sg][lane] = o;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sg == 0 && col < a.dv) {
            o = 0.0f;
            for (uint i = 0; i < FM_DELTA_SIMDGROUPS; i++)
                o += part_o[i][lane];
            y[ulong(t) * a.ld_y + h * a.dv + col] = o;
        }
    }
#pragma unroll
    for (uint i = 0; i < STEP_ROWS; i++)
        if (i < n_rows && row0 + i < dk && col < a.dv)
            s_out[head + ulong(row0 + i) * a.dv + col] = s[i];
}

// Sum over dk of x[i] * y[i].
inline float key_dot(device const float *x, device const float *y, uint dk) {
    float s = 0.0f;
    for (uint i = 0; i < dk; i++)
        s = fma(x[i], y[i], s);
    return s;
}

// The same by chunks of up to 32 rows (dk <= 128): within a chunk the corrections U of all rows
// come from one triangular solve, so most work is plain products. exp() only of differences
// G_i - G_j with j <= i, which are <= 0. Threads and groups as delta_step.
kernel void delta_chunk(device const float *qk [[buffer(0)]],
                        device const float *gates [[buffer(1)]],
                        device const float *qkv [[buffer(2)]],
                        device const float *s_in [[buffer(3)]],
                        device float *s_out [[buffer(4)]],
                        device float *y [[buffer(5)]],
                        constant fm_delta_shape &a [[buffer(6)]],
                        uint2 group [[threadgroup_position_in_grid]],
                        uint tid [[thread_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]],
                        uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float s[FM_DELTA_CHUNK_DK][FM_WIDTH];
    threadgroup float kk[FM_DELTA_CHUNK][FM_DELTA_CHUNK]; // strictly lower: beta K K^T * D
    threadgroup float qd[FM_DELTA_CHUNK][FM_DELTA_CHUNK]; // lower: Q K^T * D
    threadgroup float u[FM_DELTA_CHUNK][FM_WIDTH], decay[FM_DELTA_CHUNK];
    const uint h = group.y, kh = h / (a.n_v_heads / a.n_k_heads), dk = a.dk;
    const uint col = group.x * FM_WIDTH + lane, q_row = 2 * a.n_k_heads * dk;
    const ulong head = ulong(h) * dk * a.dv;
    for (uint i = sg; i < dk; i += FM_DELTA_SIMDGROUPS)
        s[i][lane] = col < a.dv ? s_in[head + ulong(i) * a.dv + col] : 0.0f;
    for (uint t0 = 0; t0 < a.n; t0 += FM_DELTA_CHUNK) {
        const uint n = min(a.n - t0, uint(FM_DELTA_CHUNK));
        device const float *q = qk + ulong(t0) * q_row + kh * dk;
        device const float *k = q + a.n_k_heads * dk;
        device const float *g = gates + ulong(t0) * 2 * a.n_v_heads + h;
        device const float *beta = g + a.n_v_heads;
        const uint g_row = 2 * a.n_v_heads;
        if (tid == 0) {
            float sum = 0.0f;
            for (uint i = 0; i < n; i++) {
                sum += g[i * g_row];
                decay[i] = sum;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint e = tid; e < n * FM_DELTA_CHUNK; e += FM_WIDTH * FM_DELTA_SIMDGROUPS) {
            const uint i = e / FM_DELTA_CHUNK, j = e % FM_DELTA_CHUNK;
            if (j > i)
                continue;
            const float d = exp(decay[i] - decay[j]);
            kk[i][j] = beta[i * g_row] * d * key_dot(k + i * q_row, k + j * q_row, dk);
            qd[i][j] = d * key_dot(q + i * q_row, k + j * q_row, dk);
        }
        for (uint i = sg; i < n; i += FM_DELTA_SIMDGROUPS) { // beta V - (beta exp(G) K) S
            float sum = 0.0f;
            for (uint c = 0; c < dk; c++)
                sum = fma(k[i * q_row + c], s[c][lane], sum);
            const ulong at = ulong(t0 + i) * a.ld_qkv + q_row + h * a.dv + col;
            const float v = col < a.dv ? qkv[at] : 0.0f;
            u[i][lane] = beta[i * g_row] * (v - exp(decay[i]) * sum);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sg == 0) // forward substitution; columns are independent
            for (uint i = 1; i < n; i++) {
                float x = u[i][lane];
                for (uint j = 0; j < i; j++)
                    x = fma(-kk[i][j], u[j][lane], x);
                u[i][lane] = x;
            }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = sg; i < n; i += FM_DELTA_SIMDGROUPS) {
            float o = 0.0f;
            for (uint c = 0; c < dk; c++)
                o = fma(q[i * q_row + c], s[c][lane], o);
            o *= exp(decay[i]);
            for (uint j = 0; j <= i; j++)
                o = fma(qd[i][j], u[j][lane], o);
            if (col < a.dv)
                y[ulong(t0 + i) * a.ld_y + h * a.dv + col] = o;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const float last = decay[n - 1];
        for (uint c = sg; c < dk; c += FM_DELTA_SIMDGROUPS) {
            float x = s[c][lane] * exp(last);
            for (uint i = 0; i < n; i++)
                x = fma(k[i * q_row + c] * exp(last - decay[i]), u[i][lane], x);
            s[c][lane] = x;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint i = sg; i < dk; i += FM_DELTA_SIMDGROUPS)
        if (col < a.dv)
            s_out[head + ulong(i) * a.dv + col] = s[i][lane];
}

// y = y / sqrt(mean(y^2) + eps) * w * silu(z) per head, in place: norm before gate.
// Threads: FM_WIDTH. Groups: (n_v_heads, n).
kernel void delta_output(device float *y [[buffer(0)]],
                         device const float *z [[buffer(1)]],
                         device const float *w [[buffer(2)]],
                         constant fm_delta_shape &a [[buffer(3)]],
                         uint2 group [[threadgroup_position_in_grid]],
                         uint lane [[thread_index_in_simdgroup]]) {
    device float *o = y + ulong(group.y) * a.ld_y + group.x * a.dv;
    device const float *zr = z + ulong(group.y) * a.ld_z + group.x * a.dv;
    float s = 0.0f;
    for (uint i = lane; i < a.dv; i += FM_WIDTH)
        s = fma(o[i], o[i], s);
    s = simd_sum(s);
    const float f = 1.0f / sqrt(s / float(a.dv) + a.eps);
    for (uint i = lane; i < a.dv; i += FM_WIDTH)
        o[i] = o[i] * f * w[i] * silu(zr[i]);
}
