/* The same calls for CUDA: bindings by value, dynamic shared memory for [[threadgroup(n)]].
 * Structs bound as `constant T &` travel in the launch's parameters, as Metal's setBytes does. */
struct msl_cargs {
    void *b[31];
    __attribute__((aligned(16))) char bytes[31][64];
    unsigned off[31]; /* byte offset of each threadgroup parameter in dynamic shared memory */
    unsigned grid[3]; /* threads of the grid */
};
#define MSL_DEVICE __attribute__((__device__))
extern __attribute__((__shared__)) __attribute__((aligned(16))) char msl_dyn[];
namespace msl_glue {
struct P {
    int kind, index;
};
MSL_DEVICE inline void builtin(const msl_cargs &a, int id, unsigned *o) {
    unsigned t[3] = {__nvvm_read_ptx_sreg_tid_x(), __nvvm_read_ptx_sreg_tid_y(),
                     __nvvm_read_ptx_sreg_tid_z()};
    unsigned n[3] = {__nvvm_read_ptx_sreg_ntid_x(), __nvvm_read_ptx_sreg_ntid_y(),
                     __nvvm_read_ptx_sreg_ntid_z()};
    unsigned g[3] = {__nvvm_read_ptx_sreg_ctaid_x(), __nvvm_read_ptx_sreg_ctaid_y(),
                     __nvvm_read_ptx_sreg_ctaid_z()};
    unsigned ng[3] = {__nvvm_read_ptx_sreg_nctaid_x(), __nvvm_read_ptx_sreg_nctaid_y(),
                      __nvvm_read_ptx_sreg_nctaid_z()};
    unsigned lin = t[0] + n[0] * (t[1] + n[1] * t[2]), tot = n[0] * n[1] * n[2];
    for (int i = 0; i < 3; i++)
        switch (id) {
        case MSL_B_thread_position_in_grid: o[i] = g[i] * n[i] + t[i]; break;
        case MSL_B_thread_position_in_threadgroup: o[i] = t[i]; break;
        case MSL_B_threadgroup_position_in_grid: o[i] = g[i]; break;
        case MSL_B_threads_per_threadgroup:
        case MSL_B_dispatch_threads_per_threadgroup: o[i] = n[i]; break;
        case MSL_B_threadgroups_per_grid: o[i] = ng[i]; break;
        case MSL_B_threads_per_grid: o[i] = a.grid[i]; break;
        }
    switch (id) {
    case MSL_B_thread_index_in_threadgroup: o[0] = lin; break;
    case MSL_B_thread_index_in_simdgroup: o[0] = lin & 31; break;
    case MSL_B_simdgroup_index_in_threadgroup: o[0] = lin >> 5; break;
    case MSL_B_simdgroups_per_threadgroup: o[0] = (tot + 31) / 32; break;
    case MSL_B_threads_per_simdgroup: o[0] = 32; break;
    }
}
template <class T> struct get {
    MSL_DEVICE static T of(const msl_cargs &a, int, int id) {
        unsigned o[3] = {0, 0, 0};
        builtin(a, id, o);
        if constexpr (metal::vinfo<T>::n == 1)
            return (T)o[0];
        else {
            T v;
            for (int i = 0; i < metal::vinfo<T>::n; i++)
                v[i] = (typename metal::vinfo<T>::elem)o[i];
            return v;
        }
    }
};
template <class T> struct get<T *> {
    MSL_DEVICE static T *of(const msl_cargs &a, int kind, int i) {
        return kind == 1 ? (T *)a.b[i] : (T *)(msl_dyn + a.off[i]);
    }
};
template <class T> struct get<T &> {
    MSL_DEVICE static T &of(const msl_cargs &a, int, int i) {
        static_assert(sizeof(T) <= sizeof a.bytes[0], "a larger struct needs larger slots");
        return *(T *)a.bytes[i];
    }
};
template <class... A, class... I>
MSL_DEVICE inline void call(void (*f)(A...), const msl_cargs &a, I... p) {
    f(get<A>::of(a, p.kind, p.index)...);
}
} // namespace msl_glue
