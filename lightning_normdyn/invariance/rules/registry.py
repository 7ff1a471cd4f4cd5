"""Which rule holds for which operation, and how a user adds one."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lightning_normdyn.invariance.flow import Flow, Flows
from lightning_normdyn.invariance.rules.operation import Operation, only

Result = Flow | Flows | None
Rule = Callable[[Operation, Flows], Result]
UnaryRule = Callable[[Operation, Flow], Result]

# By the name of the autograd node.
RULES: dict[str, Rule] = {}


def register_rule(node_name: str, rule: Rule) -> None:
    """Tell the target search how a scale passes an operation it does not know, e.g. a custom
    ``torch.autograd.Function``.

    Args:
        node_name: name of the autograd node, as ``tensor.grad_fn.name()`` gives it: the function's
            class name with ``Backward`` appended.
        rule: called as ``rule(operation, flows)`` with one `Flow` (or None: does not depend on the
            weight) for each differentiable input. Returns the flow of the output, or a list with
            one for each output, or raises `Blocked` with a reason. ``homogeneous`` is a ready-made
            rule for :math:`f(cx) = c f(x)`; ``operation.normalized(flow, dims)`` is the result of a
            normalization.

    Raises:
        ValueError: if ``node_name`` is no name, or ``rule`` cannot be called.

    Example:
        A custom root-mean-square normalization over the last axis:

        >>> import torch
        >>> class RootMeanSquare(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x / x.pow(2).mean(-1, keepdim=True).sqrt()
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         raise NotImplementedError
        >>> RootMeanSquare.apply(torch.ones(2, 3, requires_grad=True)).grad_fn.name()
        'RootMeanSquareBackward'
        >>> def root_mean_square(operation, flows):
        ...     return operation.normalized(flows[0], [-1], centered=False)
        >>> register_rule("RootMeanSquareBackward", root_mean_square)

        A rule holds for the whole process; this example takes its own back.

        >>> del RULES["RootMeanSquareBackward"]
    """
    if not isinstance(node_name, str) or not node_name:
        raise ValueError(f"`node_name` must be the name of an autograd node, got {node_name!r}.")
    if not callable(rule):
        raise ValueError(f"`rule` must be callable as rule(operation, flows), got {rule!r}.")
    # Ours may be replaced, too: who knows an operation better is right.
    RULES[node_name] = rule


def rule_for(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for autograd nodes of these names."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def unary_rule(*names: str) -> Callable[[UnaryRule], Rule]:
    """Decorator like `rule_for`, for operations that a scale may enter only by their first input:
    the rule gets the flow of that one."""

    def register(rule: UnaryRule) -> Rule:
        @functools.wraps(rule)
        def checked(operation: Operation, flows: Flows) -> Result:
            flow = only(operation, flows)
            return rule(operation, flow)

        return rule_for(*names)(checked)

    return register
