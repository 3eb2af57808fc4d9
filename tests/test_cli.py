"""The command line: what goes where, exit codes, one-line errors, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flashmoe import __version__
from flashmoe.cli import _COMMANDS, main

PROMPT = ["--raw", "-n", "8", "-t", "0"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def call(*args, stdin=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in args])
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return call


def spawn(*args, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "flashmoe", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_generate_puts_text_on_stdout_and_the_rest_on_stderr(run, noise_model):
    code, out, err = run("generate", noise_model, "Hello", *PROMPT)
    assert code == 0
    from flashmoe import Engine

    with Engine(noise_model) as engine:
        assert out == str(engine.generate("Hello", max_tokens=8, temperature=0)) + "\n"
    for word in ("trunk", "expert slots", "on disk", "tok/s", "K=2", "bf16", "read ", "hit rate"):
        assert word in err
    assert "its text is noise" in err


def test_generate_quiet(run, noise_model):
    code, out, err = run("generate", noise_model, "Hello", *PROMPT, "-q")
    assert (code, err) == (0, "")
    assert out


def test_prompt_comes_from_argument_dash_or_stdin(run, noise_model, monkeypatch):
    monkeypatch.setattr("flashmoe.models._DEFAULTS", ("demo_noise",))
    want = run("generate", noise_model, "Hello", *PROMPT)[1]
    assert run("generate", "Hello", *PROMPT)[1] == want  # the built-in model
    assert run("generate", noise_model, *PROMPT, stdin="Hello")[1] == want
    assert run("generate", noise_model, "-", *PROMPT, stdin="Hello")[1] == want
    assert run("generate", "-", *PROMPT, stdin="Hello")[1] == want
    assert run("generate", *PROMPT, stdin="Hello")[1] == want
    code, _, err = run("generate", *PROMPT, stdin="")
    assert code == 2
    assert "the prompt is empty" in err


def test_json(run, noise_model):
    options = ["--json", "--logprobs", "2", "--seed", "3", "--stop", "\x00", "--ignore-eos"]
    code, out, err = run("generate", noise_model, "Hello", "--raw", "-n", "5", *options)
    assert code == 0
    assert "tok/s" in err
    result = json.loads(out)
    assert len(result["token_ids"]) == len(result["logprobs"]) == 5
    assert len(result["logprobs"][0]["top"]) == 2
    assert result["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert (result["experts_per_token"], result["trained_experts_per_token"]) == (2, 2)
    assert result["plan"]["total_bytes"] <= result["plan"]["budget_bytes"]
    assert result["stats"]["bytes_read"] > 0
    assert result["chat"] is False
    assert run("generate", noise_model, "Hello", "--raw", "-n", "5", *options)[1].startswith("{")


def test_chat_is_the_default_if_there_is_a_template(run, noise_model, tmp_path):
    def n_prompt(*args):
        out = run("generate", *args, "Hello", "-n", "1", "--json", "-q")[1]
        result = json.loads(out)
        return result["usage"]["prompt_tokens"], result["chat"]

    chat, raw = n_prompt(noise_model), n_prompt(noise_model, "--raw")
    assert (chat[1], raw) == (True, (5, False))
    assert n_prompt(noise_model, "--chat") == chat
    assert n_prompt(noise_model, "--system", "Be kind")[0] > chat[0]
    assert n_prompt(noise_model, "--no-think") == chat
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        os.symlink(noise_model / name, tmp_path / name)
    assert n_prompt(tmp_path) == (5, False)
    code, _, err = run("generate", tmp_path, "Hello", "--chat")
    assert code == 1
    assert "no chat template" in err
    assert run("generate", noise_model, "Hello", "--raw", "--system", "x")[0] == 2


def test_engine_options_reach_the_engine(run, noise_model):
    code, out, _ = run(
        "generate", noise_model, "Hello", *PROMPT, "--json", "-q", "--memory", "1GiB", "--io",
        "pread", "--threads", "1", "--context", "64", "-k", "1", "--backend", "cpu",
    )  # fmt: skip
    plan = json.loads(out)["plan"]
    assert code == 0
    assert (plan["budget_bytes"], plan["n_threads"], plan["context"]) == (1 << 30, 1, 64)
    assert (plan["io"], plan["experts_per_token"]) == ("pread", 1)


def test_inspect(run, noise_model):
    code, out, err = run("inspect", noise_model)
    assert (code, err) == (0, "")
    for word in ("qwen3_5_moe", "8 in each of 3 layers, 2 per token", "24.00 KiB each", "bf16"):
        assert word in out
    facts = json.loads(run("inspect", noise_model, "--json")[1])
    assert facts["experts_bytes"] == 8 * 3 * 3 * 64 * 64 * 2
    assert facts["trunk_bytes"] + facts["experts_bytes"] < facts["files_bytes"]
    assert facts["n_params"] * 2 == pytest.approx(
        facts["trunk_bytes"] + facts["experts_bytes"], rel=0.01
    )
    assert "qwen3_5_moe" in run("inspect")[1]


@pytest.mark.parametrize(("bits", "shown"), [("4", "affine4"), ("8", "affine8"), ("keep", "bf16")])
def test_pack_then_generate(run, noise_model, tmp_path, bits, shown):
    target = tmp_path / "packed"
    code, out, err = run("pack", noise_model, target, "--bits", bits, "--verify", "--json")
    assert code == 0
    assert "checksums right" in err
    assert json.loads(out)["verify"]["n_records"] == 24
    assert shown in run("inspect", target)[1]
    code, out, _ = run("generate", target, "Hello", *PROMPT)
    assert code == 0
    if bits == "keep":
        assert out == run("generate", noise_model, "Hello", *PROMPT)[1]
    code, _, err = run("pack", noise_model, target)
    assert code == 1
    assert str(target) in err
    assert err.count("\n") == 1


def test_doctor(run, tmp_path):
    code, out, err = run("doctor", tmp_path)
    assert (code, err) == (0, "")
    for word in ("cpu variant", "io methods", "read speed", "FLASHMOE_CPU", __version__):
        assert word in out
    facts = json.loads(run("doctor", tmp_path, "--json")[1])
    assert facts["cpu_variant"] in facts["cpu_variants"]
    assert "fault" not in facts["io_methods"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "darwin", reason="tests/metal runs it there")
def test_doctor_of_a_gpu_that_is_not_there(run):
    code, out, err = run("doctor", "--metal")
    assert (code, out) == (1, "")
    assert err == (
        "flashmoe: backend 'metal' is not in this build: it needs macOS 14 on Apple silicon\n"
    )


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate", "/no/such/dir", "hi"], 1, "/no/such/dir: no such directory"),
        (["inspect", "{tmp}"], 1, "{tmp}: not a model directory (no config.json)"),
        (["generate", "{model}", "hi", "--memory", "1MiB"], 1, "smallest that works"),
        (["generate", "{model}", "hi", "--memory", "plenty"], 1, "memory='plenty' is not a size"),
        (["generate", "{model}", "hi", "--io", "tape"], 1, "auto, direct, pread"),
        (["generate", "{model}", "hi", "-k", "99"], 1, "experts_per_token=99 must be in 1..8"),
        (["generate", "{model}", "hi", "--temperature", "-1"], 1, "temperature=-1.0 must be in"),
        (
            ["generate", "{model}", "hi", "--temperature", "hot"],
            2,
            "Invalid value for '--temperature'",
        ),
        (["generate", "{model}", "hi", "there"], 2, "unexpected extra argument"),
        (["generate", "{model}", "hi", "--temprature", "1"], 2, "--temperature"),
        (["pack", "{model}"], 2, "DST"),
        (["pack", "{model}", "{tmp}/x", "--bits", "many"], 2, "--bits many"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
    ],
)
def test_errors_are_one_line(run, noise_model, tmp_path, args, code, message):
    names = {"tmp": tmp_path, "model": noise_model}
    got, out, err = run(*[a.format(**names) for a in args])
    assert (got, out) == (code, "")
    assert err.splitlines()[-1].startswith("flashmoe: ")
    assert message.format(**names) in err
    assert err.count("\n") == 1


def test_internal_errors_and_debug(run, noise_model, monkeypatch):
    def broken(*args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(sys.modules["flashmoe.cli.inspect"], "describe", broken)
    code, _, err = run("inspect", noise_model)
    assert (code, err.count("\n")) == (1, 1)
    assert "internal error, RuntimeError: two lines" in err
    for args in (["--debug", "inspect"], ["inspect", "--debug"]):
        with pytest.raises(RuntimeError):
            main([*args, str(noise_model)])


def test_help_and_version(run):
    assert run("--version")[1] == f"flashmoe {__version__}\n"
    code, out, _ = run("--help")
    assert code == 0
    for command in _COMMANDS:
        assert command.__name__ in out
        text = run(command.__name__, "--help")[1]
        assert "Usage: flashmoe " + command.__name__ in text
    code, out, err = run()
    assert code == 2
    assert "Usage" in out + err


def test_a_reader_that_goes_away(noise_model):
    process = spawn("generate", noise_model, "Hello", "-n", "4000", "--ignore-eos")
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(30) == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_ctrl_c_stops_cleanly(noise_model):
    process = spawn("generate", noise_model, "Hello", "-n", "4000", "--ignore-eos")
    first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    started = time.perf_counter()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert time.perf_counter() - started < 10
    assert "cancelled" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (first + out).endswith("\n")


def test_stdin_of_a_pipe(noise_model):
    process = spawn("generate", noise_model, *PROMPT, "-q", stdin=subprocess.PIPE)
    out, err = process.communicate("Hello", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out
