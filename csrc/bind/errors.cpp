#include "bind/errors.h"

namespace py = pybind11;

void check(fm_status s)
{
    if (s == FM_OK)
        return;
    const fm_error *e = fm_last_error();
    throw fm_exception(s, e->err, e->path, e->message);
}

void fail(fm_status s, const std::string &message) { throw fm_exception(s, 0, "", message); }

static const char *class_of(fm_status s)
{
    switch (s) {
    case FM_ERR_ARG: return "ArgumentError";
    case FM_ERR_NOMEM: return "OutOfMemory";
    case FM_ERR_IO: return "StorageError";
    case FM_ERR_FORMAT: return "ModelFileError";
    case FM_ERR_UNSUPPORTED: return "UnsupportedError";
    case FM_ERR_BACKEND: return "BackendError";
    case FM_ERR_STATE: return "StateError";
    case FM_ERR_CANCELLED: return "Cancelled";
    case FM_OK: break;
    }
    return "FlashMoeError";
}

// Names of files need not be UTF-8, and a long message may be cut within a character.
static py::object text(const std::string &s, const char *errors)
{
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(s.data(), (Py_ssize_t)s.size(), errors));
}

void register_errors()
{
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p)
                std::rethrow_exception(p);
        } catch (const fm_exception &e) {
            const py::object cls = py::module_::import("flashmoe.errors").attr(class_of(e.status));
            const bool os_error = e.status == FM_ERR_IO;
            const py::object message = text(e.what(), "replace"), path = text(e.path, "surrogateescape");
            const py::object value = os_error && e.err != 0 ? cls(e.err, message, path) : cls(message);
            if (os_error && e.err == 0 && !e.path.empty())
                value.attr("filename") = path;
            PyErr_SetObject(cls.ptr(), value.ptr());
        }
    });
}
