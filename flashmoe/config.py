"""Model configuration: strict reading of ``config.json`` into the numbers of ``fm_config``.

A key that could change the mathematics is either understood or refused by name; only keys on an
explicit list are ignored.  Nothing here knows an architecture: those are in
``checkpoint/arch_*.py``.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashmoe.errors import ModelFileError, StorageError, UnsupportedError

__all__ = ["ConfigReader", "check_config", "load_json", "nearest"]

MAX_LAYERS = 1024
MAX_JSON_BYTES = 64 << 20

FIELDS: dict[str, tuple[type, float, float]] = {
    "num_hidden_layers": (int, 1, MAX_LAYERS),
    "hidden_size": (int, 1, 1 << 20),
    "vocab_size": (int, 1, 1 << 26),
    "rms_norm_eps": (float, 0, 1),
    "tie_word_embeddings": (int, 0, 1),
    "max_position_embeddings": (int, 1, 1 << 40),
    "num_attention_heads": (int, 1, 1 << 16),
    "num_key_value_heads": (int, 1, 1 << 16),
    "head_dim": (int, 1, 1 << 16),
    "rotary_dim": (int, 0, 1 << 16),
    "rope_theta": (float, 1, 1e18),
    "attn_output_gate": (int, 0, 1),
    "qk_norm": (int, 0, 2),
    "clip_qkv": (float, 0, 1e30),
    "linear_num_key_heads": (int, 0, 1 << 16),
    "linear_num_value_heads": (int, 0, 1 << 16),
    "linear_key_head_dim": (int, 0, 1 << 16),
    "linear_value_head_dim": (int, 0, 1 << 16),
    "linear_conv_kernel_dim": (int, 0, 64),
    "num_experts": (int, 0, 1 << 16),
    "num_experts_per_tok": (int, 0, 64),
    "moe_intermediate_size": (int, 0, 1 << 24),
    "router_score": (int, 0, 1),
    "norm_topk_prob": (int, 0, 1),
    "norm_topk_eps": (float, 0, 1),
    "routed_scaling_factor": (float, -1e6, 1e6),
    "n_group": (int, 0, 1 << 16),
    "topk_group": (int, 0, 1 << 16),
    "shared_expert_intermediate_size": (int, 0, 1 << 24),
    "shared_expert_gate": (int, 0, 1),
    "intermediate_size": (int, 0, 1 << 24),
}
"""Type and range of every scalar field, as in ``csrc/model/config.h`` (a test compares the two)."""

IGNORED = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype",
    "initializer_range", "attention_dropout", "hidden_dropout", "residual_dropout", "embd_pdrop",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "vision_config", "image_token_id", "video_token_id",
    "vision_start_token_id", "vision_end_token_id", "vision_token_id", "audio_token_id",
    "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings",
    "num_nextn_predict_layers", "language_model_only", "tokenizer_class", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "_experts_implementation",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "output_attentions",
    "output_hidden_states", "return_dict", "pretraining_tp", "quantization",
    "quantization_config", "text_config", "unsloth_version", "unsloth_fixed",
})  # fmt: skip
"""Keys that cannot change the logits of the text model, or that the readers treat themselves."""

_MISSING: Any = object()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (nearest known name: 'x')"`` or ``""``, for the end of a message."""
    hit = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" (nearest known name: {hit[0]!r})" if hit else ""


def load_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object strictly: no duplicate keys, no NaN or Infinity, no more than `max_bytes`.

    Raises
    ------
    StorageError
        The file cannot be read.
    ModelFileError
        The content is not such an object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelFileError(f"{path}: {size} bytes of JSON, the limit is {max_bytes}")
        data = path.read_bytes()
    except OSError as e:
        raise StorageError(e.errno, e.strerror, str(path)) from e
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a JSON object strictly; `where` begins every message."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        d = dict(items)
        if len(d) != len(items):
            seen: set[str] = set()
            dup = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ModelFileError(f"{where}: the key {dup!r} appears twice")
        return d

    def constant(s: str) -> Any:
        raise ModelFileError(f"{where}: {s} is not a JSON number")

    try:
        obj = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant
        )
    except ModelFileError:
        raise
    except (ValueError, RecursionError) as e:
        raise ModelFileError(f"{where}: not valid JSON: {e}") from e
    if not isinstance(obj, dict):
        raise ModelFileError(f"{where}: a JSON object is wanted, got {type(obj).__name__}")
    return obj


class ConfigReader:
    """Typed access to one level of a config; what nobody asked for is refused by :meth:`finish`.

    Parameters
    ----------
    values : dict
        The JSON object.
    where : str
        Begins every message, e.g. ``"models/x/config.json: text_config"``.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self._known: set[str] = set()

    def _get(self, name: str, default: Any) -> Any:
        self._known.add(name)
        value = self.values.get(name)
        if value is None:
            if default is _MISSING:
                raise ModelFileError(f"{self.where}: {name} is missing")
            return default
        return value

    def integer(self, name: str, default: Any = _MISSING, low: int = 0, high: int = 1 << 40) -> int:
        """Return an integer in [low, high]; the range of :data:`FIELDS` applies as well."""
        v = self._get(name, default)
        if name in FIELDS:
            low, high = max(low, int(FIELDS[name][1])), min(high, int(FIELDS[name][2]))
        if isinstance(v, bool) or not isinstance(v, int):
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, an integer is wanted")
        if not low <= v <= high:
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, not in [{low}, {high}]")
        return v

    def number(
        self, name: str, default: Any = _MISSING, low: float = -1e30, high: float = 1e30
    ) -> float:
        """Return a finite number in [low, high] as a float."""
        v = self._get(name, default)
        if name in FIELDS:
            low, high = max(low, FIELDS[name][1]), min(high, FIELDS[name][2])
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, a number is wanted")
        if isinstance(v, float) and not math.isfinite(v):
            raise ModelFileError(f"{self.where}: {name} is {v}, a finite number is wanted")
        if not low <= v <= high:
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, not in [{low:g}, {high:g}]")
        return float(v)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """Return a boolean."""
        v = self._get(name, default)
        if not isinstance(v, bool):
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, true or false is wanted")
        return v

    def int_list(self, name: str, low: int, high: int) -> list[int]:
        """Return a list of integers in [low, high]; empty when absent."""
        v = self._get(name, [])
        if not isinstance(v, list) or len(v) > 1 << 16:
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, a list is wanted")
        for x in v:
            if isinstance(x, bool) or not isinstance(x, int) or not low <= x <= high:
                raise ModelFileError(
                    f"{self.where}: {name} holds {_show(x)}, integers in [{low}, {high}] are wanted"
                )
        return list(v)

    def expect(self, name: str, *allowed: Any, why: str = "") -> None:
        """Refuse any value but `allowed`; an absent or null key is fine."""
        v = self._get(name, None)
        if v is None:
            return
        if not any(v == a and type(v) is type(a) for a in allowed):
            want = " or ".join(json.dumps(a) for a in allowed) if allowed else "none"
            raise UnsupportedError(
                f"{self.where}: {name} is {_show(v)}; supported: {want}{'; ' + why if why else ''}"
            )

    def sub(self, name: str) -> ConfigReader | None:
        """Return a reader of the object `name`, or None when absent."""
        v = self._get(name, None)
        if v is None:
            return None
        if not isinstance(v, dict):
            raise ModelFileError(f"{self.where}: {name} is {_show(v)}, an object is wanted")
        return ConfigReader(v, f"{self.where}: {name}")

    def ignore(self, *names: str) -> None:
        """Declare keys that do not matter."""
        self._known.update(names)

    def finish(self) -> None:
        """Refuse every key that was neither read nor ignored, unless its value disables it."""
        for name, v in self.values.items():
            if name in self._known or name in IGNORED:
                continue
            if v is None or v is False or v == "" or v == [] or v == {}:
                continue
            raise UnsupportedError(
                f"{self.where}: unknown key {name!r} = {_show(v)} could change the model"
                f"{nearest(name, self._known)}"
            )


def read_rope(r: ConfigReader, head_dim: int, partial: float) -> tuple[float, int]:
    """Return (rope_theta, rotary_dim) from ``rope_parameters`` or the level itself.

    Parameters
    ----------
    r : ConfigReader
    head_dim : int
    partial : float
        What ``partial_rotary_factor`` is where no key gives it (the architecture's own default).

    Notes
    -----
    ``rope_theta`` has no default: references fall back to three different values.
    """
    thetas: list[float] = []
    factors: list[float] = []
    for name in ("rope_parameters", "rope_scaling"):
        sub = r.sub(name)
        if sub is None:
            continue
        for key in ("rope_type", "type"):
            sub.expect(key, "default", why="other rotary scalings are not implemented")
        # For text the three position streams of mrope are equal, so it is ordinary rotary.
        sub.ignore("mrope_section", "mrope_interleaved")
        if sub.values.get("rope_theta") is not None:
            thetas.append(sub.number("rope_theta"))
        if sub.values.get("partial_rotary_factor") is not None:
            factors.append(sub.number("partial_rotary_factor", low=0, high=1))
        sub.ignore("rope_theta", "partial_rotary_factor")
        sub.finish()
    if r.values.get("rope_theta") is not None:
        thetas.append(r.number("rope_theta"))
    if r.values.get("partial_rotary_factor") is not None:
        factors.append(r.number("partial_rotary_factor", low=0, high=1))
    r.ignore("rope_theta", "partial_rotary_factor")
    if not thetas:
        raise ModelFileError(f"{r.where}: rope_theta is missing (also from rope_parameters)")
    for name, found in (("rope_theta", thetas), ("partial_rotary_factor", factors)):
        if len(set(found)) > 1:
            raise ModelFileError(f"{r.where}: {name} is given as {found[0]:g} and as {found[1]:g}")
    rot = int(head_dim * (factors[0] if factors else partial))
    if rot < 2 or rot % 2:
        raise ModelFileError(
            f"{r.where}: rotary size {rot} of head_dim {head_dim} is not a positive even number"
        )
    return thetas[0], rot


def check_config(c: dict[str, Any], where: str) -> None:
    """Check the core's numbers: every field present, in range, and consistent with the others.

    Raises
    ------
    ModelFileError
        Naming the field and the numbers that disagree.
    """
    layers = c.get("num_hidden_layers", 0)
    for name, (kind, low, high) in FIELDS.items():
        if name not in c:
            raise ModelFileError(f"{where}: {name} is missing")
        v = c[name]
        ok = isinstance(v, (int, float)) and not isinstance(v, bool)
        if not ok or (kind is int and not isinstance(v, int)) or not low <= v <= high:
            raise ModelFileError(f"{where}: {name} is {_show(v)}, not in [{low:g}, {high:g}]")
    for name in c:
        if name not in FIELDS and name not in ("mixers", "ffns"):
            raise ModelFileError(f"{where}: unknown field {name!r}{nearest(name, FIELDS)}")
    for name in ("mixers", "ffns"):
        v = c.get(name)
        if not isinstance(v, list) or len(v) != layers or any(x not in (0, 1) for x in v):
            raise ModelFileError(f"{where}: {name} is not a list of {layers} zeros and ones")

    def divides(a: str, b: str) -> None:
        if c[a] < 1 or c[b] < 1 or c[a] % c[b]:
            raise ModelFileError(f"{where}: {a} {c[a]} is not a positive multiple of {b} {c[b]}")

    def positive(*names: str) -> None:
        for n in names:
            if c[n] < 1:
                raise ModelFileError(f"{where}: {n} is {c[n]}, a positive number is wanted")

    def at_most(a: str, b: str) -> None:
        if c[a] > c[b]:
            raise ModelFileError(f"{where}: {a} {c[a]} is larger than {b} {c[b]}")

    divides("num_attention_heads", "num_key_value_heads")
    at_most("rotary_dim", "head_dim")
    if 1 in c["mixers"]:
        divides("linear_num_value_heads", "linear_num_key_heads")
        positive("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
    if 1 in c["ffns"]:
        positive("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        at_most("num_experts_per_tok", "num_experts")
        if c["n_group"] > 1:
            divides("num_experts", "n_group")
            positive("topk_group")
            at_most("topk_group", "n_group")
            if c["num_experts"] // c["n_group"] < 2:
                raise ModelFileError(
                    f"{where}: n_group {c['n_group']} leaves fewer than 2 of "
                    f"{c['num_experts']} experts per group"
                )
            if c["num_experts"] // c["n_group"] * c["topk_group"] < c["num_experts_per_tok"]:
                raise ModelFileError(
                    f"{where}: topk_group {c['topk_group']} leaves fewer than "
                    f"num_experts_per_tok {c['num_experts_per_tok']} experts"
                )
    if 0 in c["ffns"]:
        positive("intermediate_size")


def _show(v: Any) -> str:
    """Return a short form of a JSON value for a message."""
    try:
        s = repr(v)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge integer"
    return s if len(s) <= 60 else s[:57] + "..."
