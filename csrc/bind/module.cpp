// The Python module flashmoe._core: flashmoe.h for Python, and nothing below it but internals.
#include "bind/module.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bind/errors.h"

extern "C" {
#include "backend/backend.h"
#include "base/env.h"
#include "cpu/kernels.h"
#include "flashmoe.h"
#include "io/io_list.h"
#include "model/arch_list.h"
#include "quant/quant.h"
#include "store/expert_cache.h"
}

namespace py = pybind11;

static std::vector<std::string> cpu_variants()
{
    std::vector<std::string> names;
    for (int i = 0; fm_kernels_name(i); i++)
        if (fm_kernels_supported(i))
            names.push_back(fm_kernels_name(i));
    return names;
}

static std::vector<std::tuple<std::string, std::string, std::string>> env_table()
{
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (int i = 0; i < FM_ENV_COUNT; i++) {
        const char *v = fm_env_get((fm_env)i);
        rows.emplace_back(fm_env_name((fm_env)i), fm_env_meaning((fm_env)i), v ? v : "");
    }
    return rows;
}

static uint32_t crc32c(const py::buffer &data, uint32_t crc)
{
    const py::buffer_info b = data.request();
    if (!PyBuffer_IsContiguous(b.view(), 'C'))
        fail(FM_ERR_ARG, "crc32c: the buffer is not contiguous");
    const py::gil_scoped_release nogil;
    return fm_checksum(crc, b.ptr, (size_t)(b.size * b.itemsize));
}

PYBIND11_MODULE(_core, m)
{
    register_errors();
    m.attr("version") = FM_VERSION;
    m.def("cpu_variants", &cpu_variants);
    m.def("cpu_variant", [] {
        const fm_kernels *k;
        check(fm_kernels_get(&k));
        return k->name;
    });
    m.def("io_methods", [] {
        std::vector<std::string> names;
#define X(name) names.push_back(#name);
        FM_IO_LIST(X)
#undef X
        return names;
    });
    m.def("architectures", [] {
        std::vector<std::string> names;
#define X(name) names.push_back(#name);
        FM_ARCH_LIST(X)
#undef X
        return names;
    });
    m.def("cache_policies", [] {
        std::vector<std::string> names;
        for (int i = 0; fm_cache_policy_name(i); i++)
            names.push_back(fm_cache_policy_name(i));
        return names;
    });
    m.def("trace_kinds", [] {
        std::vector<std::string> names;
        for (int i = 0; fm_trace_kind_name(i); i++)
            names.push_back(fm_trace_kind_name(i));
        return names;
    });
    m.def("quant_formats", [] {
        std::vector<std::string> names;
        for (int q = 0; q < FM_QUANT_COUNT; q++)
            names.push_back(fm_quant_get((fm_quant)q)->name);
        return names;
    });
    m.def("backends", [] {
        std::vector<std::string> names;
        for (int i = 0; fm_backend_name_at(i); i++)
            names.push_back(fm_backend_name_at(i));
        return names;
    });
    m.def("env_table", &env_table);
    m.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0);
    bind_engine(m);
    py::module_ internals = m.def_submodule("internals", "Kernels and codecs, for tests and benches only.");
    bind_internals(internals);
}
