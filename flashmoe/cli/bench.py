"""`flashmoe bench`: decode, prefill and time to the first token, against the device's ceiling."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from flashmoe.cli import options as opt

if TYPE_CHECKING:
    from flashmoe.perf.bench import Setting, Work

__all__ = ["bench"]

T = TypeVar("T")
_TIMELINE_TOKENS = 4


def _list(text: str | None, what: str, read: Callable[[str], T]) -> list[T | None]:
    if text is None:
        return [None]
    try:
        return [read(part.strip()) for part in text.split(",")]
    except ValueError as e:
        raise typer.BadParameter(f"--{what} {text}: numbers, separated by commas") from e


def _pair(text: str) -> tuple[str, int | str]:
    name, _, value = text.partition("=")
    return name, int(value) if value.lstrip("-").isdigit() else value


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory; left out: the built-in one."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    gen: Annotated[int, typer.Option(min=2, help="Tokens to make.")] = 64,
    repeat: Annotated[int, typer.Option(min=2, help="Runs; the first is cold.")] = 5,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Budget, or several: 6GiB,8GiB. (default: what is free)", show_default=False
        ),
    ] = None,
    io: Annotated[str, typer.Option(help="auto, direct, or a method; or several: a,b.")] = "auto",
    threads: Annotated[
        str | None, typer.Option(help="Compute threads, or several.", show_default=False)
    ] = None,
    lookahead: Annotated[
        str | None,
        typer.Option(
            help="Experts guessed per row for the next layer, auto, or several: 0,4,auto.",
            show_default=False,
        ),
    ] = None,
    cache_policy: Annotated[
        str | None, typer.Option(help="lru, clock, lfu, or several: a,b.", show_default=False)
    ] = None,
    numeric: Annotated[
        str | None, typer.Option(help="exact, fast, or both: exact,fast.", show_default=False)
    ] = None,
    kv_format: opt.KvFormat = "f32",
    backend: opt.Backend = "auto",
    experts_per_token: opt.ExpertsPerToken = None,
    prefill_chunk: opt.PrefillChunk = None,
    core: Annotated[
        list[str] | None,
        typer.Option(
            "--core",
            metavar="NAME=VALUE",
            help="Any other option of the core; again for more.",
            show_default=False,
        ),
    ] = None,
    feed: Annotated[
        str, typer.Option(help="Tokens while decoding: random, or greedy (the model's own).")
    ] = "random",
    seed: Annotated[int, typer.Option(help="Of prompts and of the order of reads.")] = 1,
    roof: Annotated[
        bool, typer.Option("--roof/--no-roof", help="Measure the device after each setting.")
    ] = True,
    terms: Annotated[
        bool, typer.Option("--terms", help="Measure the reads alone and the compute alone, too.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="PNG", help="Draw the results.", show_default=False)
    ] = None,
    timeline: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Write a Chrome trace of a few tokens of the first setting.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line per setting.")] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure speed with prompts that never repeat; several settings are compared A-B-A."""
    from flashmoe.perf.bench import Work, settings_of
    from flashmoe.perf.bench import bench as measure
    from flashmoe.perf.table import print_table

    if feed not in ("random", "greedy"):
        raise typer.BadParameter(f"--feed {feed}: random or greedy")
    if plot:
        from flashmoe.perf import plots

        plots.check_plotting()  # now rather than after minutes
    console = opt.stderr(quiet)
    work = Work(prompt_tokens, gen, repeat, feed, seed, roof, terms=terms)
    settings = settings_of(
        _list(memory, "memory", str),
        io.split(","),
        _list(threads, "threads", int),
        _list(lookahead, "lookahead", opt.lookahead),
        _list(cache_policy, "cache-policy", str),
        _list(numeric, "numeric", str),
        core={
            "backend": None if backend == "auto" else backend,
            "kv_format": None if kv_format == "f32" else kv_format,
            **dict(_pair(p) for p in core or ()),
        },
        experts_per_token=experts_per_token,
        prefill_chunk=prefill_chunk,
    )
    results = []
    for result in measure(model, settings, work, console.print):
        results.append(result)
        if json:
            print(jsonlib.dumps(result, ensure_ascii=False, default=str), flush=True)
    if not json:
        print_table(results)
    if timeline:
        _timeline(model, settings[0], work, timeline)
        console.print(f"{timeline}: open it in https://ui.perfetto.dev")
    if plot:
        plots.plot_bench(results, plot)
        console.print(f"{plot}: written")


def _timeline(model: str | None, setting: Setting, work: Work, path: str) -> None:
    from flashmoe import _core
    from flashmoe.perf.bench import open_runner
    from flashmoe.perf.machine import identity
    from flashmoe.perf.runner import random_ids
    from flashmoe.perf.timeline import chrome_trace, repeated_reads, write_chrome_trace

    n = min(_TIMELINE_TOKENS, work.gen_tokens)
    with open_runner(model, setting, work) as runner:
        prompts = [random_ids(runner.vocab_size, work.prompt_tokens, work.seed, 90 + i, 0)
                   for i in range(2)]  # fmt: skip
        feed = random_ids(runner.vocab_size, n, work.seed, 90, 1)
        runner.measure(prompts[0], 2)  # so that the slots are filled
        events, n_lost = runner.events(prompts[1], n, feed)
        plan, kinds = runner.plan, _core.trace_kinds()
        record = plan.experts_bytes // max(plan.n_experts, 1)
        meta = {
            "model": plan.model,
            "setting": setting.label(),
            "prompt_tokens": work.prompt_tokens,
            "events_lost": n_lost,
            "experts_read_twice_in_a_forward": repeated_reads(events, kinds, record),
            **identity(),
        }
    write_chrome_trace(path, chrome_trace(events, kinds, meta))
