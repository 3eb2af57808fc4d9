/* Owns: opening files twice, once through the page cache and once past it. File systems that accept
 * O_DIRECT at open and refuse it at the first read are found out here, not in the middle of a
 * token. */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "io/io_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"

#if defined(__linux__)
static int open_direct(const char *path)
{
    return open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
}
void fm_io_file_forget(const fm_io_file *f, int64_t off, int64_t bytes)
{
    (void)posix_fadvise(f->fd, off, bytes, POSIX_FADV_DONTNEED);
}
#else
static int open_direct(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && fcntl(fd, F_NOCACHE, 1) != 0) {
        const int err = errno;
        close(fd);
        errno = err;
        return -1;
    }
    return fd;
}
void fm_io_file_forget(const fm_io_file *f, int64_t off, int64_t bytes)
{
    (void)f, (void)off, (void)bytes; /* macOS has no such advice for files */
}
#endif

static fm_status direct_failed(int err, const char *path)
{
    if (err == EINVAL || err == ENOTSUP || err == EOPNOTSUPP)
        return fm_fail_path(FM_ERR_UNSUPPORTED, err, path,
                            "the file system refuses direct I/O; use buffered reads");
    return fm_fail_path(FM_ERR_IO, err, path, "cannot open for direct reading");
}

static fm_status probe_direct(const fm_io_file *f)
{
    void *block = NULL;
    if (f->bytes == 0)
        return FM_OK;
    FM_TRY(fm_region_alloc(FM_IO_ALIGN, false, &block));
    ssize_t n;
    do
        n = pread(f->fd_direct, block, FM_IO_ALIGN, 0);
    while (n < 0 && errno == EINTR);
    const int err = errno;
    fm_region_free(block, FM_IO_ALIGN);
    return n < 0 ? direct_failed(err, f->path) : FM_OK;
}

static fm_status open_file(const char *path, bool direct, fm_io_file *f)
{
    struct stat st;
    f->path = strdup(path);
    if (f->path == NULL)
        return fm_fail_path(FM_ERR_NOMEM, 0, path, "out of memory");
    f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us */
    if (f->fd < 0)
        return fm_fail_path(FM_ERR_IO, errno, path, "cannot open");
    if (fstat(f->fd, &st) != 0)
        return fm_fail_path(FM_ERR_IO, errno, path, "cannot stat");
    if (!S_ISREG(st.st_mode))
        return fm_fail_path(FM_ERR_IO, S_ISDIR(st.st_mode) ? EISDIR : 0, path,
                            "not a regular file");
    if (fcntl(f->fd, F_SETFL, 0) != 0) /* some file systems would answer EAGAIN to a ring */
        return fm_fail_path(FM_ERR_IO, errno, path, "cannot make blocking");
    f->bytes = st.st_size;
    if (!direct)
        return FM_OK;
    f->fd_direct = open_direct(path);
    return f->fd_direct < 0 ? direct_failed(errno, path) : probe_direct(f);
}

fm_status fm_io_file_open(const char *path, bool direct, fm_io_file *out)
{
    fm_io_file f = {.path = NULL, .fd = -1, .fd_direct = -1, .bytes = 0};
    const fm_status s = open_file(path, direct, &f);
    if (s != FM_OK) {
        fm_io_file_close(&f);
        return s;
    }
    *out = f;
    return FM_OK;
}

void fm_io_file_close(fm_io_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    if (f->fd_direct >= 0)
        close(f->fd_direct);
    free(f->path);
    *f = (fm_io_file){.path = NULL, .fd = -1, .fd_direct = -1, .bytes = 0};
}
