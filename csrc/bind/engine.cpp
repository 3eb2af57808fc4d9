// Owns: _core.Engine and _core.Session. The GIL is dropped around everything that computes or reads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <set>

#include "bind/desc.h"
#include "bind/errors.h"
#include "bind/handle.h"
#include "bind/module.h"

namespace py = pybind11;

namespace {

using Ids = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

// What is alive, for the interpreter's exit; touched with the GIL held only.
class Engine;
class Session;
std::set<Engine *> live_engines;
std::set<Session *> live_sessions;

class Engine : public std::enable_shared_from_this<Engine> {
public:
    Engine(const py::dict &desc, const py::dict &opts)
    {
        const Description d(desc);
        std::deque<std::string> strings;
        const fm_engine_opts o = read_opts(opts, strings);
        {
            fm_engine *e = nullptr;
            const py::gil_scoped_release nogil;
            check(fm_engine_open(d.model(), &o, &e));
            handle.open(e);
            check(fm_engine_get_info(e, &info));
        }
        live_engines.insert(this);
    }
    Engine(const Engine &) = delete;
    ~Engine()
    {
        live_engines.erase(this);
        handle.close();
    }

    Handle<fm_engine>::Use use() const { return handle.use(); }

    mutable Handle<fm_engine> handle{"engine", fm_engine_close};
    fm_engine_info info{}; // as opened
};

class Session : public std::enable_shared_from_this<Session> {
public:
    Session(std::shared_ptr<Engine> owner, int64_t context) : engine(std::move(owner))
    {
        const auto e = engine->use();
        {
            fm_session *s = nullptr;
            const py::gil_scoped_release nogil;
            check(fm_session_create(e.get(), context, &s));
            handle.open(s);
        }
        live_sessions.insert(this);
    }
    Session(const Session &) = delete;
    ~Session()
    {
        live_sessions.erase(this);
        handle.close();
    }

    Handle<fm_session>::Use use() const { return handle.use(); }

    std::shared_ptr<Engine> engine; // a child pins its parent
    mutable Handle<fm_session> handle{"session", fm_session_free};
};

template <typename T>
std::vector<std::shared_ptr<T>> hold(const std::set<T *> &live)
{
    std::vector<std::shared_ptr<T>> held;
    for (T *p : live)
        if (auto shared = p->weak_from_this().lock())
            held.push_back(std::move(shared));
    return held;
}

// At exit: a daemon thread that comes back from the core after Python is gone would end the process by abort().
void close_all()
{
    for (const Session *s : live_sessions)
        s->handle.refuse(fm_session_cancel);
    for (const auto &s : hold(live_sessions))
        s->handle.close();
    for (const auto &e : hold(live_engines))
        e->handle.close();
}

// fn(handle) without the GIL: each of these waits while another thread's forward runs.
template <typename T, typename Fn>
void call(const T &owner, Fn fn)
{
    const auto use = owner.use();
    const py::gil_scoped_release nogil;
    check(fn(use.get()));
}

py::dict plan(const py::dict &desc, const py::dict &opts)
{
    const Description d(desc);
    std::deque<std::string> strings;
    const fm_engine_opts o = read_opts(opts, strings);
    fm_engine_plan p{};
    check(fm_engine_plan_bytes(d.model(), &o, &p));
    py::dict out;
    out["trunk_bytes"] = p.trunk_bytes;
    out["state_bytes"] = p.state_bytes;
    out["scratch_bytes"] = p.scratch_bytes;
    out["slot_bytes"] = p.slot_bytes;
    out["n_slots_min"] = p.n_slots_min;
    out["n_experts_total"] = p.n_experts_total;
    out["expert_record_bytes_max"] = p.expert_record_bytes_max;
    out["experts_per_token"] = p.experts_per_token;
    return out;
}

py::dict info_dict(const Engine &e)
{
    fm_engine_info i{};
    call(e, [&](fm_engine *raw) { return fm_engine_get_info(raw, &i); });
    py::dict out;
    out["arch"] = e.info.arch;
    out["backend"] = e.info.backend;
    out["cpu_variant"] = e.info.cpu_variant;
    out["numeric"] = e.info.numeric;
    out["kv_format"] = e.info.kv_format;
    out["io_method"] = e.info.io_method;
    out["io_direct"] = i.io_direct;
    out["verify"] = i.verify;
    out["n_threads"] = i.n_threads;
    out["n_slots"] = i.n_slots;
    out["experts_per_token"] = i.experts_per_token;
    out["trained_experts_per_token"] = i.trained_experts_per_token;
    out["context"] = i.context;
    out["max_rows"] = i.max_rows;
    out["vocab_size"] = i.vocab_size;
    out["n_layers"] = i.n_layers;
    out["hidden_size"] = i.hidden_size;
    return out;
}

py::dict stats_dict(const Engine &e)
{
    fm_engine_stats s{};
    call(e, [&](fm_engine *raw) { return fm_engine_get_stats(raw, &s); });
    py::dict out;
#define FIELD(name) out[#name] = s.name;
    FIELD(prefill_tokens) FIELD(prefill_ns) FIELD(decode_tokens) FIELD(decode_ns) FIELD(n_forwards)
    FIELD(hits) FIELD(misses) FIELD(n_reads) FIELD(bytes_read) FIELD(read_ns) FIELD(crc_ns) FIELD(n_failed_reads)
    FIELD(guessed) FIELD(guess_used) FIELD(guess_wasted_bytes) FIELD(predicted) FIELD(predicted_right)
    FIELD(embed_ns) FIELD(attention_ns) FIELD(delta_ns) FIELD(router_ns) FIELD(experts_ns) FIELD(wait_ns)
    FIELD(shared_ns) FIELD(mlp_ns) FIELD(head_ns)
#undef FIELD
    return out;
}

py::dict forward(const Engine &e, const std::vector<std::shared_ptr<Session>> &sessions, const std::vector<Ids> &ids,
                 bool all_logits, bool trace_router, bool trace_hidden)
{
    if (sessions.size() != ids.size())
        fail(FM_ERR_ARG, "forward: " + std::to_string(sessions.size()) + " sessions and " + std::to_string(ids.size()) +
                             " id arrays");
    const auto engine = e.use();
    std::vector<Handle<fm_session>::Use> uses;
    std::vector<fm_row> rows;
    for (size_t i = 0; i < sessions.size(); i++) {
        uses.push_back(sessions[i]->use());
        if (ids[i].ndim() != 1)
            fail(FM_ERR_ARG, "forward: ids must have one dimension");
        for (py::ssize_t j = 0; j < ids[i].shape(0); j++)
            rows.push_back({uses[i].get(), ids[i].data()[j]});
    }
    const fm_engine_info &i = e.info;
    const py::ssize_t n = (py::ssize_t)rows.size();
    py::object logits = py::none(), router = py::none(), hidden = py::none();
    fm_forward_out out{};
    if (n >= 1 && n <= i.max_rows) { // else refused below, before anything is written
        if (all_logits) {
            Floats a({n, (py::ssize_t)i.vocab_size});
            out.logits = a.mutable_data();
            logits = a;
        }
        if (trace_router) {
            Ids a({n, (py::ssize_t)i.n_layers, (py::ssize_t)i.experts_per_token});
            out.router = a.mutable_data();
            router = a;
        }
        if (trace_hidden) {
            Floats a({n, (py::ssize_t)i.n_layers, (py::ssize_t)i.hidden_size});
            out.hidden = a.mutable_data();
            hidden = a;
        }
    }
    {
        const py::gil_scoped_release nogil;
        check(fm_engine_forward(engine.get(), rows.data(), (int64_t)rows.size(), &out));
    }
    py::dict d;
    d["logits"] = logits;
    d["router"] = router;
    d["hidden"] = hidden;
    return d;
}

// Events as a structured array: kind, layer, id, t0 and t1 [ns], bytes.
py::tuple trace_take(const Engine &e, int64_t capacity)
{
    if (capacity < 0)
        fail(FM_ERR_ARG, "trace_take: capacity is " + std::to_string(capacity));
    std::vector<fm_trace_event> events((size_t)capacity);
    int64_t n = 0, lost = 0;
    call(e, [&](fm_engine *raw) { return fm_engine_trace_take(raw, events.data(), capacity, &n, &lost); });
    py::array_t<fm_trace_event> a(n);
    std::copy(events.begin(), events.begin() + n, a.mutable_data());
    return py::make_tuple(a, lost);
}

double reread(const Engine &e, const Ids &layers, const Ids &ids)
{
    if (layers.ndim() != 1 || ids.ndim() != 1 || layers.shape(0) != ids.shape(0))
        fail(FM_ERR_ARG, "reread: layers and ids must have one dimension and the same length");
    const int32_t *l = layers.data(), *x = ids.data();
    const int64_t n = ids.shape(0);
    int64_t ns = 0;
    call(e, [&](fm_engine *raw) { return fm_engine_reread(raw, l, x, n, &ns); });
    return (double)ns * 1e-9;
}

int64_t prefill(const Session &s, const Ids &ids)
{
    if (ids.ndim() != 1 || ids.shape(0) < 1)
        fail(FM_ERR_ARG, "prefill: ids must have one dimension and at least one token");
    const int32_t *data = ids.data();
    const int64_t n = ids.shape(0);
    int64_t done = 0;
    call(s, [&](fm_session *raw) { return fm_session_prefill(raw, data, n, &done); });
    return done;
}

const float *has_logits(const fm_session *s)
{
    const float *l = fm_session_logits(s);
    if (!l)
        fail(FM_ERR_STATE, "no logits: nothing was computed since the session began, was rewound or loaded");
    return l;
}

Floats logits(const Session &s)
{
    const auto use = s.use();
    const float *l = has_logits(use.get());
    const py::ssize_t n = (py::ssize_t)s.engine->info.vocab_size;
    Floats a(n);
    std::copy(l, l + n, a.mutable_data());
    return a;
}

// fn(row) without a copy of the row, which is a MB for a large vocabulary. The row is the session's memory: who keeps it
// is told, while it is still good.
py::object read_logits(const Session &s, const py::function &fn)
{
    const auto use = s.use();
    const py::ssize_t n = (py::ssize_t)s.engine->info.vocab_size;
    const py::capsule owner(&s, [](void *) {}); // every array over the row holds it
    Floats row(n, has_logits(use.get()), owner);
    row.attr("setflags")(py::arg("write") = false);
    py::object got = fn(row);
    if (row.ref_count() > 1 || owner.ref_count() > 2) {
        PyErr_SetString(PyExc_BufferError, "the row of logits was kept; copy what is needed longer");
        throw py::error_already_set();
    }
    return got;
}

py::bytes save(const Session &s)
{
    size_t n = 0;
    call(s, [&](fm_session *raw) { return fm_session_save_bytes(raw, &n); });
    py::bytes out(nullptr, n);
    char *to = PyBytes_AsString(out.ptr());
    call(s, [&](fm_session *raw) { return fm_session_save(raw, to, n); });
    return out;
}

void load(const Session &s, const py::bytes &data)
{
    char *p;
    Py_ssize_t n;
    if (PyBytes_AsStringAndSize(data.ptr(), &p, &n) != 0)
        throw py::error_already_set();
    call(s, [&](fm_session *raw) { return fm_session_load(raw, p, (size_t)n); });
}

} // namespace

void bind_engine(py::module_ &m)
{
    PYBIND11_NUMPY_DTYPE(fm_trace_event, kind, layer, id, reserved, t0_ns, t1_ns, bytes);
    py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
        .def(py::init<const py::dict &, const py::dict &>(), py::arg("desc"), py::arg("opts"))
        .def_static("plan", &plan, py::arg("desc"), py::arg("opts"))
        .def("session",
             [](std::shared_ptr<Engine> e, int64_t context) { return std::make_shared<Session>(std::move(e), context); },
             py::arg("context") = 0)
        .def("forward", &forward, py::arg("sessions"), py::arg("ids").noconvert(), py::arg("all_logits") = false,
             py::arg("trace_router") = false, py::arg("trace_hidden") = false)
        .def("set_slots",
             [](const Engine &e, int32_t n) {
                 int32_t now = 0;
                 call(e, [&](fm_engine *raw) { return fm_engine_set_slots(raw, n, &now); });
                 return now;
             })
        .def("stats", &stats_dict)
        .def("reset_stats", [](const Engine &e) { call(e, fm_engine_reset_stats); })
        .def("trace_start",
             [](const Engine &e, int64_t capacity) {
                 call(e, [&](fm_engine *raw) { return fm_engine_trace_start(raw, capacity); });
             },
             py::arg("capacity"))
        .def("trace_take", &trace_take, py::arg("capacity"))
        .def("reread", &reread, py::arg("layers").noconvert(), py::arg("ids").noconvert())
        .def("close", [](const Engine &e) { e.handle.close(); })
        .def_property_readonly("info", &info_dict);

    py::class_<Session, std::shared_ptr<Session>>(m, "Session")
        .def_property_readonly("pos", [](const Session &s) { return fm_session_pos(s.use().get()); })
        .def_property_readonly("context", [](const Session &s) { return fm_session_context(s.use().get()); })
        .def("prefill", &prefill, py::arg("ids").noconvert())
        .def("step",
             [](const Session &s, int32_t id) {
                 call(s, [&](fm_session *raw) { return fm_session_step(raw, id); });
             },
             py::arg("id"))
        .def("logits", &logits)
        .def("read_logits", &read_logits, py::arg("fn"))
        .def("rewind",
             [](const Session &s, int64_t want) {
                 int64_t got = 0;
                 call(s, [&](fm_session *raw) { return fm_session_rewind(raw, want, &got); });
                 return got;
             },
             py::arg("want"))
        .def("checkpoint", [](const Session &s) { call(s, fm_session_checkpoint); })
        .def("save", &save)
        .def("load", &load, py::arg("data"))
        .def("cancel", [](const Session &s) { fm_session_cancel(s.use().get()); })
        .def("close", [](const Session &s) { s.handle.close(); });

    py::module_::import("atexit").attr("register")(py::cpp_function(&close_all));
}
