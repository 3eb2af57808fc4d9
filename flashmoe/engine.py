"""The engine: a checkpoint that is open, its memory plan, and what can be asked of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe import _core
from flashmoe.errors import ArgumentError, ModelFileError, UnsupportedError
from flashmoe.generation import Generation, Piece, SamplingConfig, collect, generate_pieces
from flashmoe.memory import MemoryPlan
from flashmoe.owner import Owner
from flashmoe.prepare import Prepared, prepare
from flashmoe.session import Session, model_fingerprint
from flashmoe.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from flashmoe.chat import ChatTemplate

__all__ = ["Engine"]

Progress = Callable[[int, int], None]


class Engine:
    """A Mixture-of-Experts model whose routed experts are read from disk as they are needed.

    Parameters
    ----------
    path : path-like or None
        A checkpoint directory, the name of one fetched by ``hf download``, or None for the small
        model that comes along.
    experts_per_token : int or None
        None is what the model was trained with.  Fewer is faster and worse; every report names it.
    memory : int, str or None
        Budget for the whole process, bytes or ``"8GiB"``; None takes what is free now, less some
        head-room.  It is planned before loading and kept to.
    io : str
        ``"auto"`` measures and chooses; ``"direct"`` and ``"uring"`` read around the page cache
        (the expert slots are the cache); ``"pread"`` and ``"mmap"`` through it (it is the cache).
    threads : int or None
        Compute threads; None is one per physical performance core that the process may use.
    context : int or None
        Tokens a session can hold; None is the model's limit, at most 4096.
    backend : str
        ``"cpu"``, or ``"metal"`` (``docs/metal.md``); ``"auto"`` is the CPU.
    prefill_chunk : int or None
        Tokens per forward while reading a prompt; None is 16 to 4096, by memory and streaming.
    numeric : str
        ``"exact"``: float32 activations.  ``"fast"``: rounded to 15 bits in blocks of 64 for
        products with quantised weights (``docs/kernels.md``).  ``"auto"``: fast for
        quantised models, exact for others, where there is nothing to gain.
    kv_format : str
        Of the attention's keys and values: ``"f32"``; ``"f16"`` or ``"bf16"`` take half the memory
        and round each to nearest (on the CPU backend; ``docs/kernels.md``).
    lookahead : int or "auto"
        Experts per token read on a guess for the next layer; ``"auto"``: as many as pay.
    cache_policy : str
        Who leaves the expert slots: ``"lru"``, ``"clock"`` or ``"lfu"``.
    on_plan : callable, optional
        Called with the :class:`MemoryPlan` before anything is loaded.

    Raises
    ------
    OutOfMemory
        The budget is too small; the message names the smallest that works.
    ModelFileError, StorageError, UnsupportedError
        The checkpoint is damaged, unreadable, or of a kind not implemented.

    Examples
    --------
    >>> with Engine(memory="2GiB") as engine:
    ...     generation = engine.generate("Hello", max_tokens=4, temperature=0)
    >>> generation.usage.completion_tokens <= 4
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        experts_per_token: int | None = None,
        memory: int | str | None = None,
        io: str = "auto",
        threads: int | None = None,
        context: int | None = None,
        backend: str = "auto",
        prefill_chunk: int | None = None,
        numeric: str = "auto",
        kv_format: str = "f32",
        lookahead: int | str = "auto",
        cache_policy: str = "lru",
        on_plan: Callable[[MemoryPlan], None] | None = None,
    ) -> None:
        prepared = prepare(
            path, experts_per_token=experts_per_token, memory=memory, io=io, threads=threads,
            context=context, backend=backend, prefill_chunk=prefill_chunk, numeric=numeric,
            kv_format=kv_format, lookahead=lookahead, cache_policy=cache_policy,
        )  # fmt: skip
        if on_plan is not None:
            on_plan(prepared.plan)
        try:
            core = _core.Engine(prepared.core_desc, prepared.core_opts())
        except UnsupportedError as e:
            if io != "auto" or not prepared.plan.io_direct:
                raise
            prepared = prepared.without_direct(str(e))
            if on_plan is not None:
                on_plan(prepared.plan)
            core = _core.Engine(prepared.core_desc, prepared.core_opts())
        self.path = prepared.path
        self._prepared: Prepared = prepared
        self.owner = Owner(core, prepared.plan)

    # ---- text ----

    def generate(
        self,
        prompt: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str, list of messages, or token ids
            Text is taken as it is; messages (``{"role": ..., "content": ...}``) go through the
            checkpoint's chat template.
        tools : sequence of dict, optional
            For the chat template.
        template_options : mapping, optional
            Further variables of the chat template, such as ``{"enable_thinking": False}``.
        progress : callable, optional
            Called with (done, total) tokens while the prompt is read.
        **options
            The fields of :class:`SamplingConfig`.

        Returns
        -------
        Generation
            ``finish_reason`` is "stop", "length" or "cancelled".
        """
        config = SamplingConfig.from_options(options).with_seed()
        ids = self._prompt_ids(prompt, tools, template_options)
        with self.owner.exclusive():
            return collect(self._pieces(ids, config, progress), config, self._identity())

    def stream(
        self,
        prompt: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Like `generate`, yielding a :class:`Piece` per token; leaving the loop early is fine."""
        config = SamplingConfig.from_options(options).with_seed()
        ids = self._prompt_ids(prompt, tools, template_options)
        self.owner.check_open()
        return self._pieces(ids, config, progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        template_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a conversation by the checkpoint's own chat template; see `generate`."""
        from flashmoe.chat import check_messages

        check_messages(messages)
        variables = dict(template_options or {})
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self.generate(
            messages, tools=tools, template_options=variables, progress=progress, **options
        )

    def cancel(self) -> None:
        """End running generations with finish reason "cancelled"; from any thread."""
        self.owner.cancel()

    # ---- numbers ----

    def logits(self, token_ids: ArrayLike) -> NDArray[np.float32]:
        """Score a text: row i holds the scores of the token after ``token_ids[:i + 1]``.

        Parameters
        ----------
        token_ids : sequence of int or ndarray of shape (n_tokens,)

        Returns
        -------
        logits : ndarray of shape (n_tokens, vocab), float32
            `vocab` includes padding ids.  Not part of the memory plan: 4 * vocab bytes a token.
        """
        ids = self.check_ids(token_ids)
        if len(ids) > self.plan.context:
            raise ArgumentError(f"{len(ids)} tokens exceed the context of {self.plan.context}")
        out = np.empty((len(ids), self.n_vocab), dtype=np.float32)
        with self.owner.exclusive() as core, self.session() as session:
            for start in range(0, len(ids), self.plan.prefill_chunk):
                chunk = ids[start : start + self.plan.prefill_chunk]
                rows = core.forward([session.core], [chunk], all_logits=True)["logits"]
                out[start : start + len(chunk)] = rows
        return out

    def session(self) -> Session:
        """Return a new :class:`Session` for explicit state.

        The plan holds one; each further one takes its memory from the expert slots.

        Raises
        ------
        OutOfMemory
            The slots cannot give that much.
        """
        with self.owner.exclusive() as core:
            self.owner.make_room()
            session = Session(self, core.session())
            self.owner.add(session)
            return session

    # ---- what it is ----

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan that was made before loading."""
        return self._prepared.plan

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's numbers, read-only; names as in the checkpoint's ``config.json``."""
        return MappingProxyType({"arch": self.plan.arch, **self._prepared.desc.config})

    @property
    def n_vocab(self) -> int:
        """Length of a row of logits, padding included."""
        return int(self._prepared.desc.config["vocab_size"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises
        ------
        TokenizerError
            It has none; token ids still work.
        """
        tokenizer = Tokenizer(self.path)
        if tokenizer.n_vocab > self.n_vocab:
            raise ModelFileError(
                f"{self.path}: tokenizer.json has ids up to {tokenizer.n_vocab - 1}, the model's "
                f"vocabulary is {self.n_vocab}"
            )
        return tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template; TokenizerError if it has none."""
        from flashmoe.chat import ChatTemplate

        return ChatTemplate.of(self.tokenizer)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        own = self.tokenizer.eos_ids if self._has_tokenizer else frozenset()
        return own | frozenset(self._prepared.desc.eos_token_ids)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the model's numbers, formats and sizes; saved sessions carry it."""
        return model_fingerprint(self._prepared.desc, self.plan.experts_per_token)

    def stats(self) -> dict[str, Any]:
        """Return counters since opening: times [ns], bytes read, expert hits and misses."""
        with self.owner.exclusive() as core:
            return {**core.stats(), **self._identity()}

    def reset_stats(self) -> None:
        """Set the counters of `stats` to zero."""
        with self.owner.exclusive() as core:
            core.reset_stats()

    @property
    def info(self) -> dict[str, Any]:
        """What the core chose: CPU variant, I/O method, threads, slots."""
        with self.owner.exclusive() as core:
            return {**core.info, **self._identity()}

    def close(self) -> None:
        """Cancel what runs, free everything; closing twice is fine."""
        self.owner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.owner.closed else self.plan.title()
        return f"<flashmoe.Engine: {state}>"

    # ---- inside ----

    @cached_property
    def _has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.plan.model,
            "experts_per_token": self.plan.experts_per_token,
            "trained_experts_per_token": self.plan.trained_experts_per_token,
            "numeric": self.plan.numeric,
            "kv_format": self.plan.kv_format,
        }

    def _prompt_ids(
        self,
        prompt: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        template_options: Mapping[str, Any] | None,
    ) -> NDArray[np.int32]:
        self.owner.check_open()
        is_messages = (
            isinstance(prompt, Sequence)
            and not isinstance(prompt, str)
            and len(prompt) > 0
            and isinstance(prompt[0], Mapping)
        )
        if is_messages:
            text = self.chat_template.render(prompt, tools=tools, **(template_options or {}))
            ids = self.check_ids(self.tokenizer.encode(text, add_special_tokens=False))
        elif tools or template_options:
            raise ArgumentError("tools and template options need messages, not text or token ids")
        elif isinstance(prompt, str):
            ids = self.check_ids(self.tokenizer.encode(prompt))
        else:
            ids = self.check_ids(prompt)
        if len(ids) > self.plan.context:
            raise ArgumentError(
                f"the prompt has {len(ids)} tokens, the context holds {self.plan.context}; open "
                "the engine with a larger context="
            )
        return ids

    def check_ids(self, ids: Any) -> NDArray[np.int32]:
        """Return ids as ndarray of shape (n,), int32; ArgumentError if they are not that."""
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0:
            raise ArgumentError("token ids must be a list of at least one integer (is it empty?)")
        if array.dtype.kind not in "iu":
            raise ArgumentError(f"token ids must be integers, not {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.n_vocab:
            bad = low if low < 0 else high
            raise ArgumentError(f"token id {bad} is not in 0..{self.n_vocab - 1}")
        return np.ascontiguousarray(array, dtype=np.int32)

    def _pieces(
        self, ids: NDArray[np.int32], config: SamplingConfig, progress: Progress | None
    ) -> Iterator[Piece]:
        n_used, detokenizer = self.n_vocab, None
        if self._has_tokenizer:
            n_used, detokenizer = self.tokenizer.n_vocab, self.tokenizer.detokenizer()
        elif config.stop:
            self.tokenizer  # noqa: B018 - raises: stop strings need text
        with self.session() as session:
            yield from generate_pieces(
                session,
                ids.tolist(),
                config,
                n_vocab=self.n_vocab,
                n_vocab_used=n_used,
                eos_ids=self.eos_token_ids,
                detokenizer=detokenizer,
                progress=progress,
            )
