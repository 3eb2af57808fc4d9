"""`flashmoe generate`: a prompt in, text out as it comes."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli import options as opt
from flashmoe.generation import Piece, SamplingConfig
from flashmoe.models import looks_like_model

if TYPE_CHECKING:
    from rich.console import Console

    from flashmoe.engine import Engine
    from flashmoe.memory import MemoryPlan

__all__ = ["generate"]

_DEFAULT = {f.name: f.default for f in fields(SamplingConfig)}


def _sampling(name: str, help: str, *flags: str) -> Any:
    default = _DEFAULT[name]
    if default not in (None, False, ()):
        help += f" (default: {default})"
    return typer.Option(*flags, help=help, show_default=False, rich_help_panel="Sampling")


def generate(
    model_or_prompt: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory; left out: the built-in one."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text; '-' or nothing reads stdin.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Through the chat template, or as it is. (default: chat if there is a template)",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Sets enable_thinking for the template."),
    ] = None,
    max_tokens: Annotated[
        int | None, _sampling("max_tokens", "At most that many new tokens.", "--max-tokens", "-n")
    ] = None,
    temperature: Annotated[
        float | None, _sampling("temperature", "0 is greedy.", "--temperature", "-t")
    ] = None,
    top_k: Annotated[int | None, _sampling("top_k", "Only the best k; 0 is off.")] = None,
    top_p: Annotated[float | None, _sampling("top_p", "Only the best p of the mass.")] = None,
    min_p: Annotated[float | None, _sampling("min_p", "Relative to the best token.")] = None,
    repetition_penalty: Annotated[
        float | None, _sampling("repetition_penalty", "On prompt and output.")
    ] = None,
    presence_penalty: Annotated[
        float | None, _sampling("presence_penalty", "On tokens in the output.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, _sampling("frequency_penalty", "Per occurrence in the output.")
    ] = None,
    stop: Annotated[
        list[str] | None, _sampling("stop", "End before this text; may be repeated.")
    ] = None,
    seed: Annotated[int | None, _sampling("seed", "Same seed, same text.")] = None,
    logprobs: Annotated[
        int | None, _sampling("logprobs", "With --json: log probabilities and that many rivals.")
    ] = None,
    ignore_eos: Annotated[
        bool, _sampling("ignore_eos", "Go on after the end token.", "--ignore-eos")
    ] = False,
    memory: opt.Memory = None,
    io: opt.Io = "auto",
    threads: opt.Threads = None,
    context: opt.Context = None,
    experts_per_token: opt.ExpertsPerToken = None,
    prefill_chunk: opt.PrefillChunk = None,
    backend: opt.Backend = "auto",
    numeric: opt.Numeric = "auto",
    kv_format: opt.KvFormat = "f32",
    lookahead: opt.Lookahead = "auto",
    cache_policy: opt.CachePolicy = "lru",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Continue a prompt, or answer it.  Text on stdout; plan, progress and speed on stderr."""
    given = dict(locals())  # the arguments, by name
    sampling = {name: given[name] for name in _DEFAULT if given.get(name) is not None}
    SamplingConfig.from_options(sampling)  # refuse before anything is loaded
    model, text = _model_and_prompt(model_or_prompt, prompt)
    console = opt.stderr(quiet)

    from flashmoe.engine import Engine

    def show_plan(plan: MemoryPlan) -> None:
        console.print(plan if console.is_terminal else str(plan))

    with Engine(
        model,
        experts_per_token=experts_per_token,
        memory=memory,
        io=io,
        threads=threads,
        context=context,
        prefill_chunk=prefill_chunk,
        backend=backend,
        numeric=numeric,
        kv_format=kv_format,
        lookahead=int(lookahead) if lookahead.isdigit() else lookahead,
        cache_policy=cache_policy,
        on_plan=show_plan,
    ) as engine:
        as_chat = _wants_chat(engine, chat, system, think)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        result = _run(
            engine,
            console,
            messages if as_chat else text,
            {} if think is None else {"template_options": {"enable_thinking": think}},
            sampling,
            echo=not json,
        )
        from flashmoe.cli.report import summary, to_json

        stats = engine.stats()
        console.print(summary(engine.plan, result, stats), style="dim")
        if json:
            opt.print_json({**to_json(engine.plan, result, stats), "chat": as_chat})
    if result[-1].finish_reason == "cancelled":
        raise typer.Exit(130)


def _model_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str]:
    """One argument is a model if it looks like one, otherwise the prompt for the default."""
    model, prompt = first, second
    if second is None and first is not None and not looks_like_model(first):
        model, prompt = None, first
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise typer.BadParameter("no prompt: give it as an argument or on stdin")
        prompt = sys.stdin.read()
    if not prompt:
        raise typer.BadParameter("the prompt is empty")
    return model, prompt


def _wants_chat(engine: Engine, chat: bool | None, system: str | None, think: bool | None) -> bool:
    from flashmoe.errors import TokenizerError

    if chat is False:
        if system is not None or think is not None:
            raise typer.BadParameter("--system and --think need --chat")
        return False
    if chat is None and system is None and think is None:
        try:
            return bool(engine.chat_template)
        except TokenizerError:
            return False
    return bool(engine.chat_template)


def _run(
    engine: Engine,
    console: Console,
    prompt: str | list[dict[str, Any]],
    extra: dict[str, Any],
    sampling: dict[str, Any],
    *,
    echo: bool,
) -> list[Piece]:
    from flashmoe.cli.interrupt import interruptible
    from flashmoe.cli.progress import prompt_bar

    pieces: list[Piece] = []
    with prompt_bar(console) as progress:
        stream = engine.stream(prompt, progress=progress, **extra, **sampling)
        for piece in interruptible(engine, stream):
            pieces.append(piece)
            if echo:
                print(piece.text, end="", flush=True)
    if echo:
        print(flush=True)
    return pieces
