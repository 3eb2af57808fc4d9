// Barriers and simdgroup operations of 32 lanes, for the fiber runner.
#ifndef MSL_SIMD_H
#define MSL_SIMD_H
namespace metal {
enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
static inline mem_flags operator|(mem_flags a, mem_flags b) {
    return (mem_flags)((unsigned)a | (unsigned)b);
}
static inline void threadgroup_barrier(mem_flags f, MSL_SITE) { __msl_barrier((unsigned)f, site); }
// Lanes meet, but TSan sees no order from it: rely on threadgroup_barrier for memory.
static inline void simdgroup_barrier(mem_flags, MSL_SITE) {
    __msl_simd(0, +[](void **, unsigned) MSL_NOTSAN {}, site, "simdgroup_barrier");
}

#define MSL_LANES(m) for (unsigned l_ = (m), l = 0; l_ && (l = __builtin_ctz(l_), true); l_ &= l_ - 1)
template <class T> struct msl_d {
    T in, out;
    ushort arg;
};
template <class T> inline T msl_lowest() {
    if constexpr (__is_floating_point(T))
        return (T)-__builtin_inff();
    else if constexpr ((T)-1 < (T)0)
        return (T)1 << (sizeof(T) * 8 - 1);
    else
        return 0;
}
template <class T> inline T msl_highest() { return (T)~msl_lowest<T>(); }
template <> inline float msl_highest<float>() { return __builtin_inff(); }

// A tree, as hardware does: the order of a float sum is not that of a loop.
#define MSL_REDUCE(name, init, op)                                                                 \
    template <class T> inline T name(T x, MSL_SITE) {                                              \
        msl_d<T> d{x, T(), 0};                                                                     \
        __msl_simd(                                                                                \
            &d,                                                                                    \
            +[](void **p, unsigned m) MSL_NOTSAN {                                                 \
                T v[32];                                                                           \
                for (int i = 0; i < 32; i++)                                                       \
                    v[i] = (m >> i & 1) ? ((msl_d<T> *)p[i])->in : (T)(init);                      \
                for (int s = 16; s; s >>= 1)                                                       \
                    for (int i = 0; i < s; i++) {                                                  \
                        T a = v[i], b = v[i + s];                                                  \
                        v[i] = (op);                                                               \
                    }                                                                              \
                MSL_LANES(m)((msl_d<T> *)p[l])->out = v[0];                                        \
            },                                                                                     \
            site, #name);                                                                          \
        return d.out;                                                                              \
    }
MSL_REDUCE(simd_sum, 0, a + b)
MSL_REDUCE(simd_max, msl_lowest<T>(), a > b ? a : b)
MSL_REDUCE(simd_min, msl_highest<T>(), a < b ? a : b)
MSL_REDUCE(simd_or, 0, a | b)
MSL_REDUCE(simd_and, ~(T)0, a & b)

struct msl_bool {
    bool in;
    unsigned long out;
};
#define MSL_VOTE(name, init, op)                                                                   \
    inline bool name(bool x, MSL_SITE) {                                                           \
        msl_bool d{x, 0};                                                                          \
        __msl_simd(                                                                                \
            &d,                                                                                    \
            +[](void **p, unsigned m) MSL_NOTSAN {                                                 \
                bool r = init;                                                                     \
                MSL_LANES(m) r = r op((msl_bool *)p[l])->in;                                       \
                MSL_LANES(m)((msl_bool *)p[l])->out = r;                                           \
            },                                                                                     \
            site, #name);                                                                          \
        return d.out;                                                                              \
    }
MSL_VOTE(simd_any, false, ||)
MSL_VOTE(simd_all, true, &&)

// The source lane of a shuffle must be active, else MSL leaves the result undefined: a fault.
#define MSL_SHUFFLE(name, src, clampself)                                                          \
    template <class T> inline T name(T x, ushort arg, MSL_SITE) {                                  \
        msl_d<T> d{x, x, arg};                                                                     \
        __msl_simd(                                                                                \
            &d,                                                                                    \
            +[](void **p, unsigned m) MSL_NOTSAN {                                                 \
                MSL_LANES(m) {                                                                     \
                    msl_d<T> *me = (msl_d<T> *)p[l];                                               \
                    int a = me->arg, s = (src);                                                    \
                    if (s < 0 || s > 31) {                                                         \
                        if (!(clampself))                                                          \
                            __msl_fault(#name ": source lane outside the simdgroup", 0);           \
                        s = l;                                                                     \
                    }                                                                              \
                    if (!(m >> s & 1))                                                             \
                        __msl_fault(#name ": source lane is not active", 0);                       \
                    else                                                                           \
                        me->out = ((msl_d<T> *)p[s])->in;                                          \
                }                                                                                  \
            },                                                                                     \
            site, #name);                                                                          \
        return d.out;                                                                              \
    }
MSL_SHUFFLE(simd_shuffle, a, 0)
MSL_SHUFFLE(simd_broadcast, a, 0)
MSL_SHUFFLE(simd_shuffle_xor, (int)(l ^ a), 0)
MSL_SHUFFLE(simd_shuffle_down, (int)l + a, 1)
MSL_SHUFFLE(simd_shuffle_up, (int)l - a, 1)

template <class T> inline T simd_prefix_inclusive_sum(T x, MSL_SITE) {
    msl_d<T> d{x, T(), 0};
    __msl_simd(
        &d,
        +[](void **p, unsigned m) MSL_NOTSAN {
            T sum = 0;
            MSL_LANES(m) {
                sum += ((msl_d<T> *)p[l])->in;
                ((msl_d<T> *)p[l])->out = sum;
            }
        },
        site, "simd_prefix_inclusive_sum");
    return d.out;
}
} // namespace metal
#endif
