"""TRL's on-policy distillation, with an order of the prompts that a resumed run finds again."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from trl import DistillationTrainer


class OnPolicyDistillationTrainer(DistillationTrainer):  # type: ignore[misc]
    """TRL's `DistillationTrainer`. Its sampler draws one order after the other from one generator, so a run that is
    resumed after its first epoch would begin with the first order again; here each epoch has its own.

    An uninterrupted run is that of TRL, to the bit.
    """

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _EpochByEpoch(super()._get_train_sampler(dataset), lambda: int((self.state.epoch or 0.0) + 1e-6))


class _EpochByEpoch(Sampler[int]):
    def __init__(self, sampler: Any, epochs_done: Callable[[], int]) -> None:
        self._sampler, self._epochs_done = sampler, epochs_done

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._sampler.seed)
            for _ in range(self._epochs_done()):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        return iter(self._sampler)
