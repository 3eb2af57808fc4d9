/* X(name): the I/O methods. "fault" wraps another method for tests and is never chosen by "auto". */
#define FM_IO_LIST(X) X(pread) X(uring) X(mmap) X(fault)
