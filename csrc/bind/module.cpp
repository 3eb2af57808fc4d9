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
#include "io/io_probe.h"
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

// Random reads for at least `seconds`: {"gb_per_s", "bytes", "n_reads", "seconds", "cpu_seconds", "p50_us", "p99_us"}.
static py::dict io_probe(const std::vector<std::string> &paths, const std::string &method, bool direct, size_t block_bytes,
                         int depth, double seconds, uint64_t seed)
{
    std::vector<const char *> raw;
    for (const std::string &p : paths)
        raw.push_back(p.c_str());
    fm_io_probe_args a{};
    a.paths = raw.data();
    a.n_paths = (int)raw.size();
    a.opts = FM_IO_OPTS_INIT;
    a.opts.method = method.c_str();
    a.opts.direct = direct;
    a.block_bytes = block_bytes;
    a.depth = depth;
    a.seconds = seconds;
    a.seed = seed;
    fm_io_probe_result r{};
    {
        const py::gil_scoped_release nogil;
        check(fm_io_probe(&a, &r));
    }
    py::dict out;
    out["gb_per_s"] = (double)r.bytes / r.seconds * 1e-9;
    out["bytes"] = r.bytes;
    out["n_reads"] = r.n_reads;
    out["seconds"] = r.seconds;
    out["cpu_seconds"] = r.cpu_seconds;
    out["p50_us"] = (double)r.p50_ns * 1e-3;
    out["p99_us"] = (double)r.p99_ns * 1e-3;
    return out;
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
    m.def("io_probe", &io_probe, py::arg("paths"), py::arg("method") = "pread", py::arg("direct") = true,
          py::arg("block_bytes") = 1 << 20, py::arg("depth") = 4, py::arg("seconds") = 0.25, py::arg("seed") = 1);
    m.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0);
    bind_engine(m);
    bind_check(m);
    py::module_ internals = m.def_submodule("internals", "Kernels and codecs, for tests and benches only.");
    bind_internals(internals);
}
