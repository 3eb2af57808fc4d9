#include "bind/desc.h"

#include <cstring>

#include "bind/errors.h"

namespace py = pybind11;

namespace {

// Python ints of any size, and only ints: what does not fit is a damaged description, not a crash.
int64_t to_i64(const py::handle &h, const char *what)
{
    if (PyBool_Check(h.ptr()))
        return h.ptr() == Py_True;
    if (!PyLong_Check(h.ptr()) && !PyIndex_Check(h.ptr()))
        fail(FM_ERR_FORMAT, std::string(what) + ": not an integer: " + py::repr(h).cast<std::string>());
    const py::object i = py::reinterpret_steal<py::object>(PyNumber_Index(h.ptr()));
    if (!i)
        throw py::error_already_set();
    const long long v = PyLong_AsLongLong(i.ptr());
    if (v == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        fail(FM_ERR_FORMAT, std::string(what) + ": out of range: " + py::repr(h).cast<std::string>());
    }
    return v;
}

int32_t to_i32(const py::handle &h, const char *what)
{
    const int64_t v = to_i64(h, what);
    if (v < INT32_MIN || v > INT32_MAX)
        fail(FM_ERR_FORMAT, std::string(what) + ": out of range: " + std::to_string(v));
    return (int32_t)v;
}

double to_double(const py::handle &h, const char *what)
{
    const double v = PyFloat_AsDouble(h.ptr());
    if (v == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        fail(FM_ERR_FORMAT, std::string(what) + ": not a number: " + py::repr(h).cast<std::string>());
    }
    return v;
}

std::string to_string(const py::handle &h, const char *what)
{
    if (!py::isinstance<py::str>(h))
        fail(FM_ERR_FORMAT, std::string(what) + ": not a string: " + py::repr(h).cast<std::string>());
    // As os.fsencode: a file name need not be UTF-8.
    const py::object bytes =
        py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(h.ptr(), "utf-8", "surrogateescape"));
    if (!bytes) {
        PyErr_Clear();
        fail(FM_ERR_FORMAT, std::string(what) + ": not a text");
    }
    std::string s(PyBytes_AS_STRING(bytes.ptr()), (size_t)PyBytes_GET_SIZE(bytes.ptr()));
    if (s.find('\0') != std::string::npos)
        fail(FM_ERR_FORMAT, std::string(what) + ": holds a NUL: " + py::repr(h).cast<std::string>());
    return s;
}

py::object need(const py::dict &d, const char *key)
{
    if (!d.contains(key))
        fail(FM_ERR_FORMAT, std::string("description: '") + key + "' is missing");
    return d[key];
}

py::sequence to_sequence(const py::handle &h, const char *what, int64_t n = -1)
{
    if (!py::isinstance<py::tuple>(h) && !py::isinstance<py::list>(h))
        fail(FM_ERR_FORMAT, std::string(what) + ": not a list or tuple");
    py::sequence s = py::reinterpret_borrow<py::sequence>(h);
    if (n >= 0 && (int64_t)s.size() != n)
        fail(FM_ERR_FORMAT, std::string(what) + ": has " + std::to_string(s.size()) + " items, needs " + std::to_string(n));
    return s;
}

int32_t to_quant(const py::handle &h, const char *what)
{
    fm_quant q;
    const std::string name = to_string(h, what);
    if (!fm_quant_find_name(name.c_str(), &q))
        fail(FM_ERR_UNSUPPORTED, std::string(what) + ": format '" + name + "' is unknown");
    return (int32_t)q;
}

template <typename T>
const T *to_table(const py::object &o, const char *what, std::vector<py::ssize_t> shape, std::vector<py::object> &keep)
{
    using Array = py::array_t<T, py::array::c_style>;
    if (!py::isinstance<Array>(o))
        fail(FM_ERR_FORMAT, std::string(what) + ": not a contiguous array of the right type");
    const Array a = py::reinterpret_borrow<Array>(o);
    bool same = a.ndim() == (py::ssize_t)shape.size();
    for (size_t i = 0; same && i < shape.size(); i++)
        same = a.shape((py::ssize_t)i) == shape[i];
    if (!same)
        fail(FM_ERR_FORMAT, std::string(what) + ": array of the wrong shape");
    keep.push_back(a);
    return a.data();
}

} // namespace

const char *Description::keep(std::string s)
{
    strings_.push_back(std::move(s));
    return strings_.back().c_str();
}

void Description::read_config(const py::dict &d)
{
#define READ_int64_t(name) config_.name = to_i64(need(d, #name), #name);
#define READ_double(name) config_.name = to_double(need(d, #name), #name);
#define X(type, name, low, high) READ_##type(name)
    FM_CONFIG_LIST(X)
#undef X
    if (config_.num_hidden_layers < 1 || config_.num_hidden_layers > FM_MAX_LAYERS)
        fail(FM_ERR_FORMAT, "config: num_hidden_layers is " + std::to_string(config_.num_hidden_layers));
    const py::sequence mixers = to_sequence(need(d, "mixers"), "mixers", config_.num_hidden_layers);
    const py::sequence ffns = to_sequence(need(d, "ffns"), "ffns", config_.num_hidden_layers);
    for (int64_t l = 0; l < config_.num_hidden_layers; l++) {
        config_.mixers[l] = to_i32(mixers[l], "mixers");
        config_.ffns[l] = to_i32(ffns[l], "ffns");
    }
    size_t known = 2;
#define X(type, name, low, high) known++;
    FM_CONFIG_LIST(X)
#undef X
    if (d.size() != known)
        fail(FM_ERR_FORMAT, "config: has " + std::to_string(d.size()) + " fields, the core knows " + std::to_string(known));
}

void Description::read_tensors(const py::sequence &list)
{
    for (const py::handle &h : list) {
        const py::sequence t = to_sequence(h, "tensor", 11);
        fm_tensor_desc out{};
        const std::string name = to_string(t[0], "tensor name");
        int id;
        if (!fm_tensor_find(name.c_str(), &id))
            fail(FM_ERR_FORMAT, "tensor '" + name + "' is unknown to the core");
        out.id = id;
        out.layer = to_i32(t[1], "layer");
        out.source = keep(to_string(t[2], "source"));
        out.format.quant = to_quant(t[3], out.source);
        out.format.group = to_i32(t[4], out.source);
        out.format.scale_quant = to_quant(t[5], out.source);
        const py::sequence shape = to_sequence(t[6], out.source);
        out.format.n_rows = out.format.n_cols = 1;
        if (shape.size() < 1 || shape.size() > 2)
            fail(FM_ERR_FORMAT, std::string(out.source) + ": has " + std::to_string(shape.size()) + " dimensions");
        out.format.n_cols = to_i64(shape[shape.size() - 1], out.source);
        if (shape.size() == 2)
            out.format.n_rows = to_i64(shape[0], out.source);
        if (fm_tensor_is_vector(id)) { // one row, whatever its shape was
            int64_t n;
            const bool fits = out.format.n_rows >= 0 && out.format.n_cols >= 0 &&
                              !__builtin_mul_overflow(out.format.n_rows, out.format.n_cols, &n);
            if (!fits)
                fail(FM_ERR_FORMAT, std::string(out.source) + ": shape is out of range");
            out.format.n_cols = n;
            out.format.n_rows = 1;
        }
        out.add_one = to_i64(t[7], "add_one") != 0;
        for (int a = 0; a < FM_AREA_COUNT; a++) {
            std::vector<fm_piece> pieces;
            for (const py::handle &p : to_sequence(t[8 + a], out.source)) {
                const py::sequence s = to_sequence(p, out.source, 3);
                pieces.push_back({to_i32(s[0], out.source), to_i64(s[1], out.source), to_i64(s[2], out.source)});
            }
            pieces_.push_back(std::move(pieces));
            out.pieces[a] = pieces_.back().data();
            out.n_pieces[a] = (int64_t)pieces_.back().size();
        }
        tensors_.push_back(out);
    }
}

void Description::read_experts(const py::sequence &list)
{
    for (const py::handle &h : list) {
        if (!py::isinstance<py::dict>(h))
            fail(FM_ERR_FORMAT, "experts: not a dict");
        const py::dict d = py::reinterpret_borrow<py::dict>(h);
        fm_expert_desc e{};
        e.layer = to_i32(need(d, "layer"), "experts layer");
        const py::sequence roles = to_sequence(need(d, "roles"), "roles", FM_ROLE_COUNT);
        for (int r = 0; r < FM_ROLE_COUNT; r++) {
            const py::sequence s = to_sequence(roles[r], "role", 5);
            e.role[r] = {to_quant(s[0], "role"), to_i32(s[1], "group"), to_quant(s[2], "role"), to_i64(s[3], "rows"),
                         to_i64(s[4], "columns")};
        }
        const py::sequence sources = to_sequence(need(d, "sources"), "sources");
        if (sources.size() > FM_MAX_SEGMENTS)
            fail(FM_ERR_FORMAT, "experts: " + std::to_string(sources.size()) + " sources, at most 9");
        e.n_sources = (int)sources.size();
        for (int s = 0; s < e.n_sources; s++)
            e.source[s] = keep(to_string(sources[s], "source"));
        const py::object file = need(d, "file");
        if (!py::isinstance<py::array>(file) || py::reinterpret_borrow<py::array>(file).ndim() != 2)
            fail(FM_ERR_FORMAT, "experts: 'file' is not a table");
        const py::ssize_t n = py::reinterpret_borrow<py::array>(file).shape(0);
        e.n_experts = n;
        e.seg_file = to_table<int32_t>(file, "experts file", {n, e.n_sources}, arrays_);
        e.seg_off = to_table<int64_t>(need(d, "offset"), "experts offset", {n, e.n_sources}, arrays_);
        const py::object crc = need(d, "crc32c");
        e.crc = crc.is_none() ? nullptr : to_table<uint32_t>(crc, "experts crc32c", {n}, arrays_);
        experts_.push_back(e);
    }
}

Description::Description(const py::dict &d)
{
    for (const py::handle &h : to_sequence(need(d, "files"), "files")) {
        const py::sequence f = to_sequence(h, "file", 2);
        files_.push_back({keep(to_string(f[0], "path")), to_i64(f[1], "file size")});
    }
    const py::object config = need(d, "config");
    if (!py::isinstance<py::dict>(config))
        fail(FM_ERR_FORMAT, "description: 'config' is not a dict");
    read_config(py::reinterpret_borrow<py::dict>(config));
    read_tensors(to_sequence(need(d, "tensors"), "tensors"));
    read_experts(to_sequence(need(d, "experts"), "experts"));
    desc_ = {files_.data(),   (int32_t)files_.size(),  tensors_.data(), (int64_t)tensors_.size(),
             experts_.data(), (int64_t)experts_.size()};
    model_ = {keep(to_string(need(d, "arch"), "arch")), &config_, &desc_};
}

fm_engine_opts read_opts(const py::dict &d, std::deque<std::string> &strings)
{
    fm_engine_opts o = FM_ENGINE_OPTS_INIT;
    const auto text = [&](const py::handle &v) {
        strings.push_back(to_string(v, "option"));
        return strings.back().c_str();
    };
    for (const auto &item : d) {
        const std::string key = to_string(item.first, "option");
        const py::handle v = item.second;
        if (key == "n_slots") o.n_slots = to_i32(v, "n_slots");
        else if (key == "context") o.context = to_i64(v, "context");
        else if (key == "max_rows") o.max_rows = to_i64(v, "max_rows");
        else if (key == "experts_per_token") o.experts_per_token = to_i64(v, "experts_per_token");
        else if (key == "n_threads") o.n_threads = to_i32(v, "n_threads");
        else if (key == "io_method") o.io_method = text(v);
        else if (key == "io_direct") o.io_direct = to_i64(v, "io_direct") != 0;
        else if (key == "io_workers") o.io_workers = to_i32(v, "io_workers");
        else if (key == "io_fault") o.io_fault = text(v);
        else if (key == "backend") o.backend = text(v);
        else if (key == "verify") o.verify = to_i64(v, "verify") != 0;
        else if (key == "cache_policy") o.cache_policy = text(v);
        else if (key == "split_bytes") o.split_bytes = (size_t)to_i64(v, "split_bytes");
        else if (key == "numeric") o.numeric = text(v);
        else if (key == "kv_format") o.kv_format = text(v);
        else if (key == "lookahead") o.lookahead = to_i64(v, "lookahead");
        else fail(FM_ERR_ARG, "engine option '" + key + "' is unknown");
    }
    return o;
}
