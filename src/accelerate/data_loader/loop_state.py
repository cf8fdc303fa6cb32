"""`DataLoaderStateMixin`: the state of a loader's loop, which `gather_for_metrics` reads."""

from __future__ import annotations

from ..state import GradientState
from .batches.batch_sharding import StepSizes


class DataLoaderStateMixin:
    """State of a loader's loop, from which ``gather_for_metrics`` drops repeated samples.

    The attributes below describe the current batch until the next one is requested. `GradientState` shows those of the
    innermost loader that is being iterated over.

    Attributes:
        end_of_dataloader: Whether the current batch is the last one of this rank. False before the first batch; stays
            True after the loop. With uneven batches, ranks reach their last batch at different steps.
        remainder: The number of samples in the last global batch beyond full ones. Documented for users; **not**
            sufficient to drop repeated samples, for which there is `step_sizes`.

            - Map-style datasets: samples per epoch modulo `total_batch_size`, at every batch (0: no padding); -1 with
              ``drop_last`` or if the number of samples is unknown.
            - Iterable datasets: -1 until the last batch, then the number of samples in the last batches of all ranks.
              For a full last batch a sharded loader keeps -1; a dispatcher gives the number.
        step_sizes: The `StepSizes` of the current step of all ranks; None if every rank has the same number of rows and
            none is padding. Ranks ``0 … step_sizes.active_ranks - 1`` have a batch at this step; the others have left
            their loops and take part in no collective. Concatenated in rank order, the first ``step_sizes.rows`` rows
            are data. `gather_rows` and `gather_items` of `accelerate.data_loader.gathering` implement this.
        short_rows: The number of rows in this rank's current batch if it is smaller than `full_rows`, else None. A
            value repeated to a full batch (``loss.repeat(batch_size)``) is trimmed to as many.

    `step_sizes` is set:

    - One rank, and with ``drop_last`` (full steps only): never.
    - Sharded, `even_batches`: at the last step if it is padded. All ranks take the same number of steps.
    - Sharded, without `even_batches`: at the last step if sizes differ; the size is 0 for ranks that have ended.
    - Sharded, custom batch sampler with batches of varying size, which are never split: at each step whose sizes differ.
      With `even_batches` the last step is completed with whole batches from the start.
    - Sharded, ``batch_size=None``, where each item is a batch: at an incomplete last step; it counts batches
      (`StepSizes.counts_batches`).
    - Sharded iterable dataset: as above, once per worker, because the workers' streams end one by one.
    - Iterable dataset of which each rank reads its own shards: at each padded step, with `StepSizes.valid_rows`.
    - Dispatched: at the last step if it is padded, and wherever sizes differ. All ranks take the same number of steps.
    """

    end_of_dataloader: bool = False
    remainder: int = -1
    step_sizes: StepSizes | None = None
    short_rows: int | None = None

    @property
    def full_rows(self) -> int | None:
        """Rows in a full batch of this rank; None if batches have no fixed size."""
        return None

    @property
    def gradient_state(self) -> GradientState:
        """The state in which the loader registers while it is iterated over."""
        return GradientState()

    def reset(self) -> None:
        """Resets the state to that before the first batch."""
        self.end_of_dataloader = False
        self.remainder = -1
        self.step_sizes = None
        self.short_rows = None

    def begin(self) -> None:
        """Registers this loader as the active one, at the start of a loop over it."""
        self.reset()
        self.remainder = self._expected_remainder()
        self.gradient_state._add_dataloader(self)

    def end(self) -> None:
        """Unregisters this loader, at the end of a loop; the loader of the enclosing loop becomes active again."""
        self.gradient_state._remove_dataloader(self)

    def _expected_remainder(self) -> int:
        return -1
