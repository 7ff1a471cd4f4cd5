"""What is refused at the start of a fit, by name: optimizers that a callback would get wrong."""

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition

from .decay import applied_decay, supports_decay_takeover
from .group_numbers import group_number, is_zero
from .recognition import applied_rate, evaluates_closure_often, is_schedule_free
from .wrappers import fires_step_hooks, inner_optimizers, prepare_step_hooks

_WITHOUT_DECAY = (
    "Set weight_decay=0 in their param group, or use weight_decay='keep' where the callback has it."
)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers that have no single step from one weight to the next.

    Raises:
        NotSupportedError: for LBFGS (evaluates its closure more than once) and schedule-free
            optimizers (keep a second copy of the weights), and for one whose step hooks torch does
            not call.
    """
    name = type(optimizer).__name__
    # Before the question, since some wrappers would get their hooks only at their first zero_grad.
    prepare_step_hooks(optimizer)
    if not fires_step_hooks(optimizer):
        raise NotSupportedError(
            f"torch calls no hooks around the step of {name}, so nobody would see it step: its "
            "__init__ never calls torch.optim.Optimizer.__init__. Let it call "
            "super().__init__(params, defaults), or return the optimizer inside it."
        )
    if evaluates_closure_often(optimizer):
        raise closure_error(optimizer)
    if is_schedule_free(optimizer):
        raise NotSupportedError(
            f"{name} keeps a second copy of the weights and trains at a point between the two, so "
            "a norm or a step of the parameter alone means nothing. Use the optimizer's ordinary "
            "form with a learning rate schedule."
        )


def closure_error(optimizer: Optimizer) -> NotSupportedError:
    """What is said of an optimizer that takes several gradients in one step."""
    return NotSupportedError(
        f"{type(optimizer).__name__} evaluates its closure more than once per step, so there is no "
        "single gradient that the update follows on. Use an optimizer that evaluates it once, such "
        "as SGD or AdamW, or SAM around one of them."
    )


def check_rate(optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
    """Refuse, for callbacks that act in proportion to the rate, one whose rate nobody can tell.

    Args:
        optimizer: right before its first step.
        weights: the weights that the callback acts on.

    Raises:
        NotSupportedError: naming the class and what it lacks.
    """
    targeted = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            # By identity: tensors compare entry by entry.
            if id(weight) in targeted and applied_rate(optimizer, group, weight) is None:
                lr = group.get("lr", "no 'lr' at all")
                raise NotSupportedError(
                    "This callback acts in proportion to the learning rate that "
                    f"{type(optimizer).__name__} applies in each step, but that cannot be told "
                    f"from its param group (lr: {lr!r}) and its state. Use an optimizer with a "
                    "learning rate of its param group, such as AdamW or SGD, or remove the "
                    "callback."
                )


def check_decay_takeover(
    optimizer: Optimizer, weights: Iterable[Tensor] | Mapping[Tensor, Partition]
) -> None:
    """Refuse, before training, a decay that cannot be taken over.

    Args:
        optimizer: whose decay.
        weights: of these weights, or of the vectors of these partitions.

    Raises:
        NotSupportedError: if a group that holds one of ``weights`` has a decay that is not 0 and
            the optimizer keeps per-step state in its groups, or is not known, or applies it to the
            rows that nobody takes over in a way that cannot be repeated.
    """
    name = type(optimizer).__name__
    reason = supports_decay_takeover(optimizer)
    # A wrapper's own groups may be read by nobody.
    if inner_optimizers(optimizer):
        reason = f"{name} steps through the optimizer inside it, which has param groups of its own"
    if reason is None:
        if isinstance(weights, Mapping):
            _check_rest(optimizer, weights)
        return
    targeted = {id(weight) for weight in weights}
    for group in optimizer.param_groups:
        decay = group_number(group, "weight_decay")
        if not is_zero(decay) and any(id(p) in targeted for p in group["params"]):
            raise NotSupportedError(
                f"The weight decay {decay} of {name} would have to be taken over for these "
                f"weights, but {reason}. {_WITHOUT_DECAY}"
            )


def _check_rest(optimizer: Optimizer, partitions: Mapping[Tensor, Partition]) -> None:
    """The rows that belong to no vector keep the optimizer's decay, so it must be repeatable."""
    for group in optimizer.param_groups:
        partial = [p for p in group["params"] if p in partitions and partitions[p].partial]
        if not partial or is_zero(group_number(group, "weight_decay")):
            continue
        some_rows = (
            f"Some rows of a weight keep the weight decay {group['weight_decay']} of "
            f"{type(optimizer).__name__} while that of the others is taken over, but"
        )
        ways_out = (
            "set weight_decay=0 in the weight's param group, or use weight_decay='keep' where the "
            "callback has it."
        )
        # One weight stands for all of the group: the law is the group's.
        if applied_decay(optimizer, group, partial[0]) is None:
            raise NotSupportedError(
                f"{some_rows} a trial could not tell how it applies its decay, so it cannot be "
                f"applied to those rows alone. Instead, {ways_out}"
            )
        if group.get("fused") and any(p.dtype.itemsize < 4 for p in partial):
            raise NotSupportedError(
                f"{some_rows} its fused kernel applies it in float32 within the update, and the "
                f"weight is stored in less. Use fused=False, {ways_out}"
            )
