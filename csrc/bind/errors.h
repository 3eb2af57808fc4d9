// Owns: the one place where fm_status becomes a Python exception of flashmoe.errors.
#ifndef FM_BIND_ERRORS_H
#define FM_BIND_ERRORS_H

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

extern "C" {
#include "base/status.h"
}

struct fm_exception : std::runtime_error {
    fm_exception(fm_status s, int e, std::string p, const std::string &m)
        : std::runtime_error(m), status(s), err(e), path(std::move(p)) {}
    fm_status status;
    int err;
    std::string path;
};

// Copies this thread's message at once; needs no GIL.
void check(fm_status s);
[[noreturn]] void fail(fm_status s, const std::string &message);
void register_errors();

#endif
