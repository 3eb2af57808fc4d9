// The conformance suite of a backend, for `flashmoe doctor`.
#include <string>

#include "bind/errors.h"
#include "bind/module.h"

extern "C" {
#include "backend/backend_check.h"
}

namespace py = pybind11;

namespace {

// Closes in the order of need, whatever is thrown.
struct Open {
    fm_pool *pool = nullptr;
    fm_check *check = nullptr;
    ~Open()
    {
        fm_check_close(check);
        fm_pool_close(pool);
    }
};

py::dict case_of(const fm_check_result &r)
{
    py::dict out;
    out["op"] = r.op;
    out["sizes"] = r.sizes;
    out["worst"] = r.worst;
    out["us"] = r.us;
    out["gb_per_s"] = r.gb_per_s;
    out["message"] = r.message;
    return out;
}

// {"device", "max_bytes", "max_buffer_bytes", "cases": [...]}; signals are seen between two cases.
py::dict backend_check(const std::string &backend, bool small, int n_threads)
{
    Open o;
    check(fm_pool_open(n_threads, &o.pool));
    check(fm_check_open(backend.c_str(), o.pool, small, &o.check));
    const fm_caps caps = fm_check_caps(o.check);
    py::dict out;
    out["device"] = caps.device ? caps.device : "";
    out["max_bytes"] = caps.max_bytes;
    out["max_buffer_bytes"] = caps.max_buffer_bytes;
    py::list cases;
    for (int i = 0; i < fm_check_n_cases(o.check); i++) {
        fm_check_result r{};
        {
            const py::gil_scoped_release nogil;
            check(fm_check_run(o.check, i, &r));
        }
        cases.append(case_of(r));
        if (PyErr_CheckSignals() != 0)
            throw py::error_already_set();
    }
    out["cases"] = cases;
    return out;
}

} // namespace

void bind_check(py::module_ &m)
{
    m.def("backend_check", &backend_check, py::arg("backend"), py::arg("small") = false, py::arg("n_threads") = 1);
}
