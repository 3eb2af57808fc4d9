/* Private to io/: one opened file, and all that differs between systems about files. */
#ifndef FM_IO_IO_FILE_H
#define FM_IO_IO_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct fm_io_file {
    char *path;
    int fd;        /* through the page cache; always open */
    int fd_direct; /* past it; -1 unless asked for */
    int64_t bytes; /* when it was opened */
} fm_io_file;

/* FM_ERR_UNSUPPORTED when direct is refused by the file system. On failure nothing stays open. */
fm_status fm_io_file_open(const char *path, bool direct, fm_io_file *out);
void fm_io_file_close(fm_io_file *f);
void fm_io_file_forget(const fm_io_file *f, int64_t off, int64_t bytes);

#endif
