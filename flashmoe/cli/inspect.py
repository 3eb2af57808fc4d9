"""`flashmoe inspect`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli import options as opt

if TYPE_CHECKING:
    from flashmoe.checkpoint.description import ModelDescription

__all__ = ["describe", "inspect"]


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory; left out: the built-in one."),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Show architecture, sizes and formats of a checkpoint; no weight is read."""
    from flashmoe.checkpoint import open_checkpoint
    from flashmoe.models import default_model

    facts = describe(open_checkpoint(model or default_model()))
    if json:
        opt.print_json(facts)
        return
    from rich import print as rich_print
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(facts):
        table.add_row(name, text)
    rich_print(table)


def describe(desc: ModelDescription) -> dict[str, Any]:
    """Return the facts of a checkpoint as plain data; sizes in bytes."""
    config = desc.config
    trunk: Counter[str] = Counter()
    n_params = 0
    for t in desc.tensors:
        trunk[t.format] += sum(p.n_bytes for p in (*t.codes, *t.scales, *t.biases))
        n_params += prod(t.shape)
    per_expert, formats = 0, set()
    n_experts = int(config["num_experts"]) if desc.experts else 0
    for e in desc.experts:
        n_expert_params = sum(r.n_rows * r.n_cols for r in (e.gate, e.up, e.down))
        n_params += n_experts * n_expert_params
        formats |= {_role_text(r) for r in (e.gate, e.up, e.down)}
        per_expert = max(per_expert, sum(_role_bytes(r) for r in (e.gate, e.up, e.down)))
    k = int(config["num_experts_per_tok"]) if desc.experts else 0
    return {
        "path": str(desc.path),
        "arch": desc.arch,
        "origin": desc.origin,
        "n_params": n_params,
        "n_layers": int(config["num_hidden_layers"]),
        "hidden_size": int(config["hidden_size"]),
        "vocab_size": int(config["vocab_size"]),
        "max_context": int(config["max_position_embeddings"]),
        "n_moe_layers": len(desc.experts),
        "n_experts": n_experts,
        "experts_per_token": k,
        "expert_formats": sorted(formats),
        "expert_bytes": per_expert,
        "experts_bytes": per_expert * n_experts * len(desc.experts),
        "read_bytes_per_token_max": per_expert * k * len(desc.experts),
        "trunk_formats": dict(sorted(trunk.items())),
        "trunk_bytes": sum(trunk.values()),
        "n_files": len(desc.files),
        "files_bytes": sum(n for _, n in desc.files),
        "tokenizer": (desc.path / "tokenizer.json").is_file(),
        "eos_token_ids": list(desc.eos_token_ids),
        "kept_for_later": len(desc.extra),
        "skipped": len(desc.skipped),
        "recipe": desc.recipe,
    }


def _role_text(role: Any) -> str:
    return f"{role.format} group {role.group}" if role.group else str(role.format)


def _role_bytes(role: Any) -> int:
    from flashmoe.checkpoint.formats import bits_of

    n = role.n_rows * role.n_cols
    bits = bits_of(role.format)
    if not bits:
        return int(n) * {"f32": 4, "f16": 2, "bf16": 2}[role.format]
    scale_bytes = {"f32": 4, "f16": 2, "bf16": 2}[role.scale_format]
    return int(n) * bits // 8 + 2 * scale_bytes * (int(n) // int(role.group))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from flashmoe.memory import format_bytes

    trunk = ", ".join(f"{f} {format_bytes(n)}" for f, n in facts["trunk_formats"].items())
    rows = [
        ("path", facts["path"]),
        ("architecture", f"{facts['arch']} ({facts['origin']} files)"),
        ("parameters", f"{facts['n_params'] / 1e9:.3g} billion"),
        ("layers", f"{facts['n_layers']}, hidden size {facts['hidden_size']}"),
        ("vocabulary", f"{facts['vocab_size']}, end tokens {facts['eos_token_ids']}"),
        ("context", f"up to {facts['max_context']} tokens"),
        ("trunk", f"{format_bytes(facts['trunk_bytes'])}: {trunk}"),
    ]
    if facts["n_experts"]:
        rows += [
            ("experts", f"{facts['n_experts']} in each of {facts['n_moe_layers']} layers, "
             f"{facts['experts_per_token']} per token"),
            ("expert format", ", ".join(facts["expert_formats"])),
            ("expert bytes", f"{format_bytes(facts['expert_bytes'])} each, "
             f"{format_bytes(facts['experts_bytes'])} in all"),
            ("read per token", f"at most {format_bytes(facts['read_bytes_per_token_max'])}"),
        ]  # fmt: skip
    rows.append(("files", f"{facts['n_files']}, {format_bytes(facts['files_bytes'])}"))
    rows.append(("tokenizer", "tokenizer.json" if facts["tokenizer"] else "none, token ids only"))
    if facts["kept_for_later"] or facts["skipped"]:
        rows.append(
            ("left out", f"{facts['kept_for_later']} kept for later, {facts['skipped']} skipped")
        )
    if facts["recipe"]:
        plain = {k: v for k, v in facts["recipe"].items() if isinstance(v, (str, int))}
        rows.append(("recipe", ", ".join(f"{k} {v}" for k, v in plain.items())))
    return rows
