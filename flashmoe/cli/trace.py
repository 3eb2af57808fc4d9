"""`flashmoe trace`: record which experts a run picks, and replay it through caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli import options as opt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flashmoe.perf.runner import Runner

__all__ = ["trace"]

trace = typer.Typer(
    name="trace",
    help="Record which experts a run picks, and replay it through caches.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@trace.command()
def record(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory.")],
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Text, or random:N for N random token ids."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="NPZ", help="File to write.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=0, help="To make.")] = 128,
    feed: Annotated[
        str, typer.Option(help="Tokens while decoding: greedy, or random ids.")
    ] = "greedy",
    seed: Annotated[int, typer.Option(help="Of random ids.")] = 1,
    memory: opt.Memory = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    experts_per_token: opt.ExpertsPerToken = None,
    plot: Annotated[
        str | None, typer.Option(metavar="PNG", help="Draw a heat map.", show_default=False)
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Run a prompt and write the experts of every row and layer."""
    from flashmoe.perf import plots
    from flashmoe.perf.runner import Runner, random_ids
    from flashmoe.perf.trace import record as record_trace

    if feed not in ("greedy", "random"):
        raise typer.BadParameter(f"--feed {feed}: greedy or random")
    options: dict[str, Any] = {
        "memory": memory, "context": context, "threads": threads,
        "experts_per_token": experts_per_token,
    }  # fmt: skip
    with Runner(model, **options) as runner:
        ids = _ids(runner, prompt, seed)
        n = runner.plan.context - len(ids)
        if n < 0:
            raise typer.BadParameter(f"a prompt of {len(ids)} tokens needs a larger --context")
        n = min(max_tokens, n)
        fed = random_ids(runner.vocab_size, n, seed, 1) if feed == "random" else None
        stop = runner.prepared.desc.eos_token_ids
        made = record_trace(runner, ids, n, feed=fed, stop_ids=stop)
    made.save(output)
    rows = len(made.ids)
    opt.stderr(quiet).print(
        f"{output}: {rows} rows ({made.n_prompt} of the prompt), {made.n_keys} experts"
    )
    if plot:
        plots.plot_heat_map(made.counts(), plot, f"{made.meta['model']}, {rows} rows")


def _ids(runner: Runner, prompt: str, seed: int) -> NDArray[np.int32]:
    import numpy as np

    from flashmoe.perf.runner import random_ids

    kind, _, number = prompt.partition(":")
    if kind == "random" and number.isdigit() and int(number) > 0:
        return random_ids(runner.vocab_size, int(number), seed, 0)
    from flashmoe.tokenizer import Tokenizer

    return np.asarray(Tokenizer(runner.path).encode(prompt), np.int32)


@trace.command()
def replay(
    file: Annotated[str, typer.Argument(metavar="NPZ", help="What record wrote.")],
    slots: Annotated[
        str | None,
        typer.Option(
            help="Sizes, separated by commas: 500,1000 or 10%,25%. (default: 5% to 75%)",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="lru, clock, lfu, belady (a bound), separated by commas.")
    ] = "lru,clock,lfu,belady",
    part: Annotated[str, typer.Option(help="Rows: decode, prompt or all.")] = "decode",
    plot: Annotated[
        str | None, typer.Option(metavar="PNG", help="Draw hit rates.", show_default=False)
    ] = None,
    heat_map: Annotated[
        str | None, typer.Option(metavar="PNG", help="Draw who is used.", show_default=False)
    ] = None,
    json: opt.Json = False,
) -> None:
    """Print the hit rate of every policy and size, the cache empty at first."""
    from flashmoe.perf import plots
    from flashmoe.perf.trace import load_trace
    from flashmoe.perf.trace import replay as replay_trace

    recorded = load_trace(file)
    sizes = _sizes(slots or "5%,10%,17%,25%,50%,75%", recorded.n_keys, recorded.ids.shape[2])
    policies = [p.strip() for p in policy.split(",")]
    rows = replay_trace(recorded, sizes, policies, part)
    if json:
        opt.print_json({"trace": file, "part": part, "n_keys": recorded.n_keys,
                        "meta": recorded.meta, "results": rows})  # fmt: skip
    else:
        _show(rows, sizes, policies, f"{file}: hit rate, {part} rows, {recorded.n_keys} experts")
    if plot:
        plots.plot_hit_rates(rows, plot)
    if heat_map:
        plots.plot_heat_map(recorded.counts(part), heat_map, f"{file}, {part} rows")


def _sizes(text: str, n_keys: int, least: int) -> list[int]:
    try:
        found = [
            round(float(s[:-1]) / 100 * n_keys) if s.endswith("%") else int(s)
            for s in (part.strip() for part in text.split(","))
        ]
    except ValueError as e:
        raise typer.BadParameter(f"--slots {text}: numbers or percentages, by commas") from e
    return sorted({max(n, least) for n in found})


def _show(rows: list[dict[str, object]], sizes: list[int], policies: list[str],
          title: str) -> None:  # fmt: skip
    from rich import print as rich_print
    from rich.table import Table

    rate = {(r["n_slots"], r["policy"]): r["hit_rate"] for r in rows}
    share = {r["n_slots"]: r["share"] for r in rows}
    table = Table(title=title, title_justify="left", box=None)
    for name in ("slots", "share", *policies):
        table.add_column(name, justify="right")
    for n in sizes:
        cells = [f"{100 * float(str(rate[n, p])):.1f} %" for p in policies]
        table.add_row(str(n), f"{100 * float(str(share[n])):.1f} %", *cells)
    rich_print(table)
