"""What part of the weights the training data can see: the WRS paper's input space projection, once
per chosen epoch."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from lightning_normdyn.engine.arguments import (
    Granularity,
    Params,
    check_choice,
    check_count,
    is_number,
)
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.flavours import LightningModule
from lightning_normdyn.input_span.part import SpanPart, SpanWorker
from lightning_normdyn.monitor.history_files import KeepsHistory


class InputSpanMonitor(NormDynCallback, KeepsHistory):
    r"""Logs what part of each layer's weights its inputs can see, and how the weights are
    distributed (WRS paper, Figures 4 to 6).

    During a chosen epoch, inputs of the targeted layers (rows of linear layers, patches of
    convolutions) are gathered from the batches that the model is trained on. At the epoch's last
    batch the eigenvectors of their covariance are computed. The leading ones, which hold the share
    ``energy`` of the variance, are the span of the inputs. Keys are ``<quantity>/<parameter
    name>``:

    - ``input_span_energy``: share of a weight vector's squared norm inside the span (truncated
      basis), mean over the vectors.
    - ``input_span_noise``: the rest: what the data cannot see.
    - ``input_span_rank``: directions in the span; for grouped convolutions the mean over groups, 0
      for constant inputs.
    - ``ggd_shape_input``: generalized-Gaussian shape of the weights in the whole eigenbasis
      (rotated, norms kept): 2 Gaussian, 1 Laplace.
    - ``ggd_shape_parameter``: the same of the weights as they are.

    **What differs from the paper**, which feeds data to a model whose weights stand still: here
    weights move while inputs are gathered, so a deeper layer's inputs are a mixture over the epoch,
    with dropout and augmentation as trained. The weights that are looked at are those after the
    epoch's last step. With ``dataloader``, inputs are gathered as in the paper: after that last
    step, in a pass over this loader at fixed weights, in evaluation mode and without gradients,
    which leaves the model and all global random states as they were. There `call_model` is called
    with each batch: it runs ``forward`` on the first element, or with the entries of a mapping that
    ``forward`` takes as keyword arguments; override it where that is not what you want. One batch
    is tried at fit start.

    A checkpoint within a chosen epoch holds what was gathered so far, on one process and up to 64
    MiB. Otherwise, the inputs after a resume are those of the batches that are left.

    Compiled code (``torch.compile``) calls no hooks, so what runs inside it is refused by name, or
    left out with a warning under ``"auto"``; with ``dataloader`` it runs eagerly and is measured.
    Not for FSDP1, DeepSpeed and tensor parallelism, where whole inputs or weights are not at hand.

    **Cost.** No forward pass but with ``dataloader``. Per layer with :math:`d` entries per filter
    and :math:`g` groups: at most ``max_samples`` rows, :math:`g d^2` multiply-adds for each,
    :math:`8 g d^2` bytes, which are read and written once per batch, and about :math:`10 g d^3`
    operations for the eigenvectors (beyond 5120 entries: a randomized method for the leading ones
    only, and no ``ggd_shape_input``). At most 2 GiB of covariances are held at once. Layers that do
    not fit take turns: another part of them in every chosen epoch, or with ``dataloader`` a pass
    for each part. A layer that does not fit alone is refused by name (left out, with a warning,
    under ``"auto"``).

    Args:
        every_n_epochs: measure in every so many-th training epoch.
        dataloader: batches to gather the inputs from at fixed weights, as the paper does: a loader
            of its own, the same on every rank (they share the batches). None: the training batches.
        max_samples: most rows to take per layer, over all ranks, spread over the epoch or the
            loader; where their length is not known, the first ones.
        energy: share of the inputs' variance that makes the span, in (0, 1].
        method: how the shape is fitted: ``"moments"``, or ``"mle"`` (slower, more precise on clean
            data).
        seed: of the choice of rows, and of random numbers in passes over ``dataloader``.
        params: ``"auto"`` (every weight of a linear layer or convolution that an optimizer owns), a
            glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``: the vectors that energy
            and noise are averaged over.

    Attributes:
        history: the same rows in memory, on rank zero, logger or not, with histograms of the
            weights as per-vector arrays (`lightning_normdyn.plots.plot_input_span`,
            `plot_weight_histogram`).

    Raises:
        ValueError: for numbers out of range, and a ``dataloader`` that can be run through only
            once.

    Example:
        >>> from lightning_normdyn import InputSpanMonitor
        >>> InputSpanMonitor(10, max_samples=20_000).energy
        0.99
    """

    writes = shows_tables = False
    worker = SpanWorker
    part = SpanPart
    numbers = ("every_n_epochs", "max_samples", "energy", "method", "seed")

    def __init__(
        self,
        every_n_epochs: int = 1,
        *,
        dataloader: Iterable[Any] | None = None,
        max_samples: int = 100_000,
        energy: float = 0.99,
        method: Literal["moments", "mle"] = "moments",
        seed: int = 0,
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs, 1)
        self.max_samples = check_count("max_samples", max_samples, 2)
        self.seed = check_count("seed", seed, 0)
        # NumPy takes no larger ones, and each rank adds its own number.
        if self.seed >= 2**31:
            raise ValueError(f"`seed` must be below 2**31, got {seed!r}.")
        if not is_number(energy) or not 0 < energy <= 1:
            raise ValueError(f"`energy` must be in (0, 1], got {energy!r}.")
        # An iterator would be empty from the second chosen epoch on: hours into a training.
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"`dataloader` must be iterable once per chosen epoch, such as a DataLoader; got "
                f"{type(dataloader).__name__}, which can be run through only once."
            )
        self.energy = float(energy)
        self.method = check_choice("method", method, ("moments", "mle"))
        self.dataloader = dataloader
        KeepsHistory.__init__(self)

    def call_model(self, module: LightningModule, batch: Any) -> None:
        """Run ``module`` on a batch of ``dataloader``; override it where ``forward`` wants
        something else.

        Args:
            module: the LightningModule, in evaluation mode.
            batch: collated and on the device.
        """
        # Inputs come first in a batch. What follows is for the loss, and `forward` does not take
        # it.
        first = batch
        if isinstance(batch, (tuple, list)):
            first = batch[0]
        if isinstance(first, Mapping):
            taken = inspect.signature(module.forward).parameters.values()
            # Labels in the mapping are left out unless `forward` takes any keyword: one that it
            # does not know would raise.
            everything = any(p.kind is p.VAR_KEYWORD for p in taken)
            by_name = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            chosen = {key: value for key, value in first.items() if everything or key in by_name}
            if chosen:
                module(**chosen)
                return
        module(first)
