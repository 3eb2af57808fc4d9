"""Checkpoint readers: a directory of files becomes one validated :class:`ModelDescription`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flashmoe.checkpoint import (
    arch_glm4_moe,
    arch_mixtral,
    arch_olmoe,
    arch_qwen3_5,
    arch_qwen3_5_moe,
    arch_qwen3_moe,
    arch_qwen3_next,
    hf,
    mlx,
    packed,
)
from flashmoe.checkpoint.arch import Architecture, ModelConfig
from flashmoe.checkpoint.description import ModelDescription
from flashmoe.checkpoint.source import is_directory, read_tensors
from flashmoe.config import ConfigReader, _show, check_config, load_json, nearest
from flashmoe.errors import ModelFileError, StorageError, UnsupportedError

__all__ = ["ARCHITECTURES", "ModelDescription", "open_checkpoint", "read_model_config"]

ARCHITECTURES: tuple[Architecture, ...] = (
    arch_qwen3_5_moe.ARCH,
    arch_qwen3_5.ARCH,
    arch_qwen3_next.ARCH,
    arch_qwen3_moe.ARCH,
    arch_mixtral.ARCH,
    arch_olmoe.ARCH,
    arch_glm4_moe.ARCH,
)


def open_checkpoint(path: str | Path) -> ModelDescription:
    """Describe a checkpoint without reading any weight.

    Parameters
    ----------
    path : str or Path
        A directory (packed, Hugging Face or MLX), or a Hugging Face repository id that has been
        downloaded already.

    Raises
    ------
    ModelFileError
        Something is missing, damaged or contradictory.
    UnsupportedError
        An architecture, feature or format that is not implemented.
    StorageError
        The system refused a file operation.
    """
    directory = _resolve(path)
    if (directory / "flashmoe.json").is_file():
        return packed.open_packed(directory)
    if not (directory / "config.json").is_file():
        raise ModelFileError(f"{directory}: not a model directory (no config.json)")
    hf_config = load_json(directory / "config.json")
    arch, mc = read_model_config(hf_config, str(directory / "config.json"))
    table = read_tensors(directory)
    describe = mlx.describe if mlx.is_mlx(table, hf_config) else hf.describe
    d = describe(table, arch, mc, hf_config)
    d.eos_token_ids = read_eos_ids(directory, hf_config, d.config["vocab_size"])
    return d


def _resolve(path: str | Path) -> Path:
    p = Path(path)
    if is_directory(p):
        return p.absolute()
    if p.exists():
        raise ModelFileError(f"{p}: not a directory; give the directory that holds config.json")
    name = str(path)
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise StorageError(2, "no such directory", name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except ImportError as e:
        raise UnsupportedError(f"{name}: no such directory (huggingface_hub is missing)") from e
    except Exception as e:  # huggingface_hub raises many kinds; all mean "not in the cache"
        raise ModelFileError(
            f"{name}: neither a directory nor in the local Hugging Face cache; "
            f"download it first: hf download {name}"
        ) from e


def read_model_config(hf_config: dict[str, Any], where: str) -> tuple[Architecture, ModelConfig]:
    """Return the architecture and its numbers from the content of ``config.json``.

    Parameters
    ----------
    hf_config : dict
    where : str
        Begins every message.
    """
    _refuse_quantisation(hf_config, where)
    kind = hf_config.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{where}: model_type is {_show(kind)}, a string is wanted")
    by_type = {t: a for a in ARCHITECTURES for t in a.model_types}
    arch = by_type.get(kind)
    if arch is None:
        raise UnsupportedError(
            f"{where}: model_type {_show(kind)}; supported: {', '.join(by_type)}"
            f"{nearest(kind, by_type)}"
        )
    text = hf_config.get("text_config")
    if text is None:
        reader = ConfigReader(hf_config, where)
        mc = arch.read_config(reader)
        reader.finish()
        check_config(mc.core, where)
        return arch, mc
    if not isinstance(text, dict):
        raise ModelFileError(f"{where}: text_config is {_show(text)}, an object is wanted")
    inner = text.get("model_type", kind)
    if inner not in arch.model_types:
        raise ModelFileError(
            f"{where}: model_type {kind!r}, but text_config has {_show(inner)}"
        )
    _refuse_quantisation(text, f"{where}: text_config")
    reader = ConfigReader(text, f"{where}: text_config")
    mc = arch.read_config(reader)
    reader.finish()
    top = ConfigReader(hf_config, where)
    if hf_config.get("tie_word_embeddings") is not None:
        tied = top.flag("tie_word_embeddings")
        # The two levels may disagree in re-saved files; the presence of lm_head then decides.
        mc.tied = tied if mc.tied in (None, tied) else None
    top.ignore("tie_word_embeddings", *(k for k, v in text.items() if hf_config.get(k) == v))
    top.finish()
    check_config(mc.core, where)
    return arch, mc


def _refuse_quantisation(config: dict[str, Any], where: str) -> None:
    q = config.get("quantization_config") or config.get("compression_config")
    if isinstance(q, dict) and q.get("quant_method") is not None:
        raise UnsupportedError(
            f"{where}: quantization_config has quant_method {_show(q['quant_method'])}; "
            "supported: none (BF16, F16, F32) and MLX affine"
        )


def read_eos_ids(directory: Path, hf_config: dict[str, Any], vocab: int) -> tuple[int, ...]:
    """Return the end-of-sequence ids of config.json and generation_config.json, in that order."""
    sources = [(hf_config, "config.json")]
    if isinstance(hf_config.get("text_config"), dict):
        sources.append((hf_config["text_config"], "config.json: text_config"))
    generation = directory / "generation_config.json"
    if generation.is_file():
        sources.append((load_json(generation), generation.name))
    ids: list[int] = []
    for config, name in sources:
        v = config.get("eos_token_id")
        for i in v if isinstance(v, list) else [] if v is None else [v]:
            if type(i) is not int or not 0 <= i < vocab:
                raise ModelFileError(
                    f"{directory / name}: eos_token_id {_show(i)} is not a token id below {vocab}"
                )
            if i not in ids:
                ids.append(i)
    return tuple(ids)
