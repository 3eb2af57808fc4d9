/* Device, buffers, libraries, pipelines of the stand-in framework. */
#include "fake_metal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static long live;
static FakeBuffer *buffers[FAKE_MAX_BUFFERS];
static int n_buffers;
static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER;

void fake_fail(NSString *what)
{
    fprintf(stderr, "FakeMetal: failed assertion: %s\n", [what UTF8String]);
    [NSException raise:@"MTLValidation" format:@"%@", what];
}

long fake_env(const char *name, long otherwise)
{
    const char *v = getenv(name);
    return v && *v ? atol(v) : otherwise;
}

NSError *fake_error(NSString *domain, NSInteger code, NSString *text)
{
    NSDictionary *info = [NSDictionary dictionaryWithObject:text forKey:NSLocalizedDescriptionKey];
    return [NSError errorWithDomain:domain code:code userInfo:info];
}

__attribute__((visibility("default"))) long fake_metal_live(void) { return __atomic_load_n(&live, __ATOMIC_SEQ_CST); }

@implementation FakeObject
- (id)init
{
    if ((self = [super init]))
        __atomic_fetch_add(&live, 1, __ATOMIC_SEQ_CST);
    return self;
}
- (void)dealloc
{
    __atomic_fetch_sub(&live, 1, __ATOMIC_SEQ_CST);
    [super dealloc];
}
@end

/* ---- buffers ------------------------------------------------------------------------------------- */

static void register_buffer(FakeBuffer *b)
{
    pthread_mutex_lock(&registry);
    if (n_buffers < FAKE_MAX_BUFFERS)
        buffers[n_buffers++] = b;
    pthread_mutex_unlock(&registry);
}

void fake_buffers_protect(NSSet *allowed, bool hide)
{
    pthread_mutex_lock(&registry);
    for (int i = 0; i < n_buffers; i++) {
        const FakeBuffer *b = buffers[i];
        if (![allowed containsObject:buffers[i]])
            mprotect(b->p, (b->len + FAKE_PAGE - 1) / FAKE_PAGE * FAKE_PAGE, hide ? PROT_NONE : PROT_READ | PROT_WRITE);
    }
    pthread_mutex_unlock(&registry);
}

@implementation FakeBuffer
- (NSUInteger)length { return len; }
- (void *)contents { return options == MTLResourceStorageModePrivate ? NULL : p; }
- (uint64_t)gpuAddress { return (uint64_t)(uintptr_t)p; }
- (NSUInteger)hash { return (NSUInteger)(uintptr_t)self; }
- (BOOL)isEqual:(id)other { return self == other; }
- (void)dealloc
{
    CHECK(!in_flight, @"MTLBuffer %p is deallocated while a command buffer uses it", p);
    pthread_mutex_lock(&registry);
    for (int i = 0; i < n_buffers; i++)
        if (buffers[i] == self) {
            buffers[i] = buffers[--n_buffers];
            break;
        }
    pthread_mutex_unlock(&registry);
    if (map_bytes)
        munmap(p, map_bytes);
    [super dealloc];
}
@end

/* ---- libraries ------------------------------------------------------------------------------------ */

/* The host's classes have no room for variables here, so alloc makes these instead. */
@interface FakeConstants : NSObject {
@public
    NSMutableDictionary *values;
}
@end

@implementation FakeConstants
- (id)init
{
    if ((self = [super init]))
        values = [[NSMutableDictionary alloc] init];
    return self;
}
- (void)dealloc
{
    [values release];
    [super dealloc];
}
- (void)setConstantValue:(const void *)value type:(MTLDataType)type atIndex:(NSUInteger)index
{
    CHECK(type == MTLDataTypeUInt, @"setConstantValue: the stand-in knows uint only");
    [values setObject:[NSData dataWithBytes:value length:4] forKey:[NSNumber numberWithUnsignedLong:index]];
}
@end

@implementation MTLFunctionConstantValues
+ (id)alloc
{
    return (id)[FakeConstants alloc];
}
- (void)setConstantValue:(const void *)value type:(MTLDataType)type atIndex:(NSUInteger)index
{
    (void)value, (void)type, (void)index; /* never called: see alloc */
}
@end

@implementation MTLCompileOptions
- (void)setLanguageVersion:(MTLLanguageVersion)v
{
    CHECK(v <= MTLLanguageVersion3_1, @"language version %lu is newer than macOS 14", (unsigned long)v);
}
- (void)setFastMathEnabled:(BOOL)on
{
    CHECK(!on, @"fast math: the stand-in computes exactly, so a host that asks for it is not tested");
}
@end

@implementation FakeFunction
- (void)dealloc
{
    [library release];
    [constants release];
    [super dealloc];
}
@end

@implementation FakePipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup
{
    return function->kernel->max_threads ? function->kernel->max_threads : 1024;
}
- (void)dealloc
{
    [function release];
    [super dealloc];
}
@end

@implementation FakeLibrary
- (id<MTLFunction>)newFunctionWithName:(NSString *)name
                        constantValues:(MTLFunctionConstantValues *)constantValues
                                 error:(NSError **)error
{
    for (int i = 0; i < lib->n_kernels; i++)
        if (!strcmp(lib->kernels[i].name, [name UTF8String])) {
            FakeFunction *f = [[FakeFunction alloc] init];
            f->library = [self retain];
            f->kernel = &lib->kernels[i];
            f->constants = [((FakeConstants *)constantValues)->values mutableCopy];
            return f;
        }
    if (error)
        *error = fake_error(@"MTLLibraryErrorDomain", 5, [@"no function named " stringByAppendingString:name]);
    return nil;
}
@end

/* ---- device ---------------------------------------------------------------------------------------- */

@interface FakeDevice : FakeObject <MTLDevice>
@end

/* FAKE_METAL_COMPILE is a command that type-checks and compiles a file and prints the library's path. The library
 * stays loaded: the sanitizers keep pointers into it. */
static void *compile_source(const char *text, char *why, size_t why_len)
{
    const char *tool = getenv("FAKE_METAL_COMPILE");
    const char *folder = getenv("TMPDIR");
    char path[1024], command[4096], out[4096] = "";
    CHECK(tool, @"newLibraryWithSource: FAKE_METAL_COMPILE is not set");
    snprintf(path, sizeof path, "%s/fake-metal-XXXXXX", folder && *folder ? folder : "/tmp");
    const int fd = mkstemp(path);
    CHECK(fd >= 0, @"newLibraryWithSource: no file in %s", path);
    const bool written = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close(fd);
    snprintf(command, sizeof command, "env -u LD_PRELOAD %s %s 2>&1", tool, path);
    FILE *f = written ? popen(command, "r") : NULL;
    const size_t n = f ? fread(out, 1, sizeof out - 1, f) : 0;
    const int status = f ? pclose(f) : -1;
    unlink(path);
    out[n] = 0;
    if (status == 0)
        out[strcspn(out, "\n")] = 0;
    void *so = status == 0 ? dlopen(out, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!so)
        snprintf(why, why_len, "%s", status ? out : dlerror());
    return so;
}

@implementation FakeDevice
- (NSString *)name { return @"stand-in for Metal (CPU)"; }
- (BOOL)supportsFamily:(MTLGPUFamily)f { return f == MTLGPUFamilyMetal3; }
- (uint64_t)recommendedMaxWorkingSetSize { return (uint64_t)fake_env("FAKE_METAL_WORKING_SET", 16l << 30); }
- (NSUInteger)maxBufferLength { return (NSUInteger)fake_env("FAKE_METAL_MAX_BUFFER", 8l << 30); }

- (id<MTLSharedEvent>)newSharedEvent { return [[FakeEvent alloc] init]; }

- (id<MTLCommandQueue>)newCommandQueue { return [[FakeQueue alloc] init]; }

- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options
{
    CHECK(length > 0, @"newBufferWithLength: 0");
    CHECK(length <= [self maxBufferLength], @"newBufferWithLength: %lu is over maxBufferLength", (unsigned long)length);
    const size_t full = (length + FAKE_PAGE - 1) / FAKE_PAGE * FAKE_PAGE;
    FakeBuffer *b = [[FakeBuffer alloc] init];
    b->map_bytes = full + FAKE_PAGE; /* the last page stays unreadable */
    b->p = mmap(NULL, b->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect((char *)b->p + full, FAKE_PAGE, PROT_NONE);
    memset(b->p, 0xff, length); /* contents are undefined: make them NaN */
    b->len = length;
    b->options = options;
    register_buffer(b);
    return b;
}

- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void *)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void *, NSUInteger))deallocator
{
    CHECK((uintptr_t)pointer % FAKE_PAGE == 0, @"newBufferWithBytesNoCopy: pointer %p is not page-aligned", pointer);
    CHECK(length > 0 && length % FAKE_PAGE == 0, @"newBufferWithBytesNoCopy: length %lu is no multiple of a page",
          (unsigned long)length);
    CHECK(!deallocator, @"newBufferWithBytesNoCopy: the stand-in knows no deallocator");
    CHECK(options == MTLResourceStorageModeShared, @"newBufferWithBytesNoCopy: storage must be shared");
    FakeBuffer *b = [[FakeBuffer alloc] init];
    b->p = pointer;
    b->len = length;
    b->options = options;
    register_buffer(b);
    return b;
}

- (id<MTLLibrary>)newLibraryWithSource:(NSString *)source options:(MTLCompileOptions *)o error:(NSError **)error
{
    static NSString *last; /* compiling takes a second: once for each text in a row */
    static void *so;
    CHECK(o, @"newLibraryWithSource: no options");
    if (![last isEqual:source]) {
        char why[4096];
        so = compile_source([source UTF8String], why, sizeof why);
        [last release];
        last = so ? [source copy] : nil;
        if (!so && error)
            *error = fake_error(@"MTLLibraryErrorDomain", 3, [NSString stringWithUTF8String:why]);
        if (!so)
            return nil;
    }
    const msl_library *(*get)(void) = (const msl_library *(*)(void))dlsym(so, "msl_get_library");
    FakeLibrary *l = [[FakeLibrary alloc] init];
    l->lib = get();
    return l;
}

- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)f error:(NSError **)error
{
    (void)error;
    CHECK(f, @"newComputePipelineStateWithFunction: nil");
    FakePipeline *p = [[FakePipeline alloc] init];
    p->function = [(FakeFunction *)f retain];
    return p;
}
@end

__attribute__((visibility("default"))) id<MTLDevice> MTLCreateSystemDefaultDevice(void)
{
    return fake_env("FAKE_METAL_NO_DEVICE", 0) ? nil : [[FakeDevice alloc] init];
}
