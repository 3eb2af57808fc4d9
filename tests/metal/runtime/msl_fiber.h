/* Fibers for the runner: a context switch of a few instructions, and what the sanitizers want to
 * be told about it. ucontext would add two system calls to each switch. */
#ifndef MSL_FIBER_H
#define MSL_FIBER_H
#include <stddef.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MSL_TSAN 1
/* no_sanitize("thread") would still record calls and returns, and fibers never return: the record
 * of each of TSan's fibers would grow by every threadgroup, until it ran over. */
#define NOTSAN __attribute__((disable_sanitizer_instrumentation))
extern "C" {
void *__tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void *, unsigned);
void *__tsan_get_current_fiber(void);
void __tsan_acquire(void *);
void __tsan_release(void *);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
}
#endif
#if __has_feature(address_sanitizer)
#define MSL_ASAN 1
extern "C" {
void __asan_poison_memory_region(void const volatile *, size_t);
void __asan_unpoison_memory_region(void const volatile *, size_t);
void __sanitizer_start_switch_fiber(void **, const void *, size_t);
void __sanitizer_finish_switch_fiber(void *, const void **, size_t *);
}
#endif
#endif

#ifndef NOTSAN
#define NOTSAN
#endif

/* Saves the running stack pointer to *save and goes on at `to`. */
#if defined(__x86_64__)
/* Inline and without call and ret: all lanes wait in the same function, so the processor's guess of
 * where the next ret leads stays right across switches. 128: the red zone. */
__attribute__((always_inline)) NOTSAN static inline void msl_switch(void **save, void *to) {
    asm volatile("lea -128(%%rsp),%%rsp\n push %%rbp\n lea 1f(%%rip),%%rax\n push %%rax\n"
                 "mov %%rsp,(%%rdi)\n mov %%rsi,%%rsp\n pop %%rax\n jmp *%%rax\n"
                 "1: pop %%rbp\n lea 128(%%rsp),%%rsp\n"
                 : "+D"(save), "+S"(to)
                 :
                 : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
                   "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}
#elif defined(__aarch64__)
#define MSL_FRAME 160
extern "C" void msl_switch(void **save, void *to);
asm(".text\n"
    ".globl msl_switch\n"
    "msl_switch:\n"
    " sub sp,sp,#160\n"
    " stp x19,x20,[sp]\n stp x21,x22,[sp,#16]\n stp x23,x24,[sp,#32]\n"
    " stp x25,x26,[sp,#48]\n stp x27,x28,[sp,#64]\n stp x29,x30,[sp,#80]\n"
    " stp d8,d9,[sp,#96]\n stp d10,d11,[sp,#112]\n stp d12,d13,[sp,#128]\n"
    " stp d14,d15,[sp,#144]\n"
    " mov x2,sp\n str x2,[x0]\n mov sp,x1\n"
    " ldp x19,x20,[sp]\n ldp x21,x22,[sp,#16]\n ldp x23,x24,[sp,#32]\n"
    " ldp x25,x26,[sp,#48]\n ldp x27,x28,[sp,#64]\n ldp x29,x30,[sp,#80]\n"
    " ldp d8,d9,[sp,#96]\n ldp d10,d11,[sp,#112]\n ldp d12,d13,[sp,#128]\n"
    " ldp d14,d15,[sp,#144]\n"
    " add sp,sp,#160\n ret\n");
#else
#error "no context switch for this processor"
#endif

/* The stack pointer of a fiber that starts at `entry` on a stack of n bytes. */
NOTSAN static inline void *fiber_stack(char *stack, size_t n, void (*entry)(void)) {
    void **sp = (void **)(stack + n);
#if defined(__x86_64__)
    *--sp = nullptr; /* alignment of a called function */
    *--sp = (void *)entry;
#else
    sp = (void **)(stack + n - MSL_FRAME);
    for (int i = 0; i < MSL_FRAME / 8; i++)
        sp[i] = nullptr;
    sp[11] = (void *)entry; /* x30 */
#endif
    return sp;
}
#endif
