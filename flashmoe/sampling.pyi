from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

class Sampler:
    n_vocab: int
    n_vocab_used: int
    seed: int
    def __init__(
        self,
        n_vocab: int,
        n_vocab_used: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: dict[int, float],
        seed: int,
    ) -> None: ...
    def reseed(self, seed: int) -> None: ...
    def random(self) -> float: ...
    def observe_prompt(self, ids: Iterable[int]) -> None: ...
    def accept(self, id: int) -> None: ...
    def sample(self, logits: NDArray[np.float32]) -> int: ...
    def distribution(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
    def logprobs(
        self, logits: NDArray[np.float32], id: int, n: int
    ) -> tuple[float, NDArray[np.int32], NDArray[np.float64]]: ...
