/* Calls a kernel with the arguments of the current lane. Included by generated code only. */
#include "msl_abi.h"
extern "C" {
void *msl_arg_ptr(int, int);
void msl_arg_builtin(int, unsigned *);
}
namespace msl_glue {

template <class P> struct get {
    static P of(const msl_param &p) {
        unsigned o[3];
        msl_arg_builtin(p.index, o);
        if constexpr (metal::vinfo<P>::n == 1)
            return (P)o[0];
        else {
            P v;
            for (int i = 0; i < metal::vinfo<P>::n; i++)
                v[i] = (typename metal::vinfo<P>::elem)o[i];
            return v;
        }
    }
    static void info(msl_param &p) { p.elem_size = 0; }
};

template <class T> struct get<T *> {
    static T *of(const msl_param &p) { return (T *)msl_arg_ptr(p.kind, p.index); }
    static void info(msl_param &p) {
        p.elem_size = sizeof(T);
        p.elem_align = alignof(T);
    }
};

template <class T> struct get<T &> {
    static T &of(const msl_param &p) { return *(T *)msl_arg_ptr(p.kind, p.index); }
    static void info(msl_param &p) {
        p.elem_size = sizeof(T);
        p.elem_align = alignof(T);
        p.is_ref = 1;
    }
};

template <unsigned... I> struct seq {};
template <unsigned N, unsigned... I> struct make_seq : make_seq<N - 1, N - 1, I...> {};
template <unsigned... I> struct make_seq<0, I...> {
    typedef seq<I...> type;
};

template <class... P, unsigned... I>
inline void call2(void (*f)(P...), const msl_param *p, seq<I...>) {
    f(get<P>::of(p[I])...);
}
template <class... P> inline void call(void (*f)(P...), const msl_param *p) {
    call2(f, p, typename make_seq<sizeof...(P)>::type());
}
template <class... P, unsigned... I>
inline bool fill2(void (*)(P...), msl_param *p, seq<I...>) {
    (get<P>::info(p[I]), ...);
    return true;
}
template <class... P> inline bool fill(void (*f)(P...), msl_param *p) {
    return fill2(f, p, typename make_seq<sizeof...(P)>::type());
}
} // namespace msl_glue
