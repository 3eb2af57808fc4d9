// Atomics: relaxed only, as MSL has for device and threadgroup memory.
#ifndef MSL_ATOMIC_H
#define MSL_ATOMIC_H
namespace metal {
enum memory_order { memory_order_relaxed = 0 };
template <class T> struct atomic { T v; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
#define MSL_ATOMICS(AS)                                                                            \
    template <class T> inline T atomic_load_explicit(AS const atomic<T> *p, memory_order) {        \
        return __atomic_load_n(&p->v, 0);                                                          \
    }                                                                                              \
    template <class T, class U>                                                                    \
    inline void atomic_store_explicit(AS atomic<T> *p, U x, memory_order) {                        \
        __atomic_store_n(&p->v, (T)x, 0);                                                          \
    }                                                                                              \
    template <class T, class U>                                                                    \
    inline T atomic_fetch_add_explicit(AS atomic<T> *p, U x, memory_order) {                       \
        return __atomic_fetch_add(&p->v, (T)x, 0);                                                 \
    }
MSL_ATOMICS(device)
#ifdef MSL_CHECK
MSL_ATOMICS(threadgroup)
#endif
} // namespace metal
#endif
