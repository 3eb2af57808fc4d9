// Reference codecs and kernels as NumPy functions, so that tests can hold every variant against the oracle.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bind/errors.h"
#include "bind/module.h"

extern "C" {
#include "base/mem.h"
#include "cpu/kernels.h"
}

namespace py = pybind11;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

fm_quant quant_named(const std::string &name)
{
    fm_quant q;
    if (!fm_quant_find_name(name.c_str(), &q))
        fail(FM_ERR_ARG, "format '" + name + "' is unknown");
    return q;
}

void need_bytes(const Bytes &b, int64_t n, const char *what)
{
    if (b.size() != n)
        fail(FM_ERR_ARG, std::string(what) + ": " + std::to_string(b.size()) + " bytes, needs " + std::to_string(n));
}

fm_mat make_mat(const std::string &format, int32_t group, const std::string &scale_format, int64_t n_rows, int64_t n_cols,
                const Bytes &codes, const Bytes &scales, const Bytes &biases)
{
    const fm_quant q = quant_named(format), sq = quant_named(scale_format);
    check(fm_quant_check(q, n_cols, group, sq));
    const fm_mat m = fm_mat_make(q, group, sq, n_rows, n_cols, codes.data(), scales.data(), biases.data());
    need_bytes(codes, n_rows * m.codes_stride, "codes");
    if (fm_quant_get(q)->affine) {
        need_bytes(scales, n_rows * m.scales_stride, "scales");
        need_bytes(biases, n_rows * m.scales_stride, "biases");
    }
    return m;
}

py::tuple encode(const Floats &w, const std::string &format, int32_t group, const std::string &scale_format)
{
    const fm_quant q = quant_named(format), sq = quant_named(scale_format);
    const int64_t n_rows = w.shape(0), n_cols = w.shape(1);
    check(fm_quant_check(q, n_cols, group, sq));
    const int64_t cb = fm_quant_codes_bytes(q, n_cols), sb = fm_quant_scales_bytes(q, n_cols, group, sq);
    Bytes codes(n_rows * cb), scales(n_rows * sb), biases(n_rows * sb);
    for (int64_t r = 0; r < n_rows; r++)
        fm_quant_get(q)->encode_ref(w.data() + r * n_cols, n_cols, group, sq, codes.mutable_data() + r * cb,
                                    scales.mutable_data() + r * sb, biases.mutable_data() + r * sb);
    return py::make_tuple(codes, scales, biases);
}

Floats decode(const std::string &variant, const std::string &format, int32_t group, const std::string &scale_format,
              int64_t n_rows, int64_t n_cols, const Bytes &codes, const Bytes &scales, const Bytes &biases)
{
    fm_kernels k;
    check(fm_kernels_variant(variant.c_str(), &k));
    const fm_mat m = make_mat(format, group, scale_format, n_rows, n_cols, codes, scales, biases);
    Floats y({n_rows, n_cols});
    for (int64_t r = 0; r < n_rows; r++)
        k.decode_row[m.format](&m, r, y.mutable_data() + r * n_cols);
    return y;
}

py::tuple route(const std::string &variant, const Floats &logits, int64_t k, bool sigmoid, bool renorm, float eps,
                float scale, int64_t n_group, int64_t topk_group, const py::object &bias)
{
    fm_kernels kern;
    check(fm_kernels_variant(variant.c_str(), &kern));
    const int64_t n = logits.shape(0), E = logits.shape(1);
    if (k < 1 || k > E || k > 64)
        fail(FM_ERR_ARG, "route: k is " + std::to_string(k));
    Floats b;
    if (!bias.is_none())
        b = bias.cast<Floats>();
    const fm_route_args a = {E, k, sigmoid, renorm, eps, scale, n_group, topk_group, bias.is_none() ? nullptr : b.data()};
    py::array_t<int32_t> ids({n, k});
    Floats w({n, k});
    std::vector<float> scratch((size_t)E);
    for (int64_t r = 0; r < n; r++)
        kern.route(&a, logits.data() + r * E, ids.mutable_data() + r * k, w.mutable_data() + r * k, scratch.data());
    return py::make_tuple(ids, w);
}

} // namespace

void bind_internals(py::module_ &m)
{
    m.def("n_allocs", [] { return fm_mem_n_allocs(); }); // of the core, since start: decode must not move it
    m.def("encode", &encode, py::arg("w").noconvert(), py::arg("format"), py::arg("group") = 64,
          py::arg("scale_format") = "bf16");
    m.def("decode", &decode, py::arg("variant"), py::arg("format"), py::arg("group"), py::arg("scale_format"),
          py::arg("n_rows"), py::arg("n_cols"), py::arg("codes").noconvert(), py::arg("scales").noconvert(),
          py::arg("biases").noconvert());
    m.def("route", &route, py::arg("variant"), py::arg("logits").noconvert(), py::arg("k"), py::arg("sigmoid") = false,
          py::arg("renorm") = true, py::arg("eps") = 0.0f, py::arg("scale") = 1.0f, py::arg("n_group") = 0,
          py::arg("topk_group") = 0, py::arg("bias") = py::none());
}
