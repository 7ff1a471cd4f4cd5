"""Names without wrappers, and patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import Wrapper

from lightning_normdyn.errors import NoTargetsError
from lightning_normdyn.invariance.names import match_patterns, normalize_params, parameter_names


def test_parameter_names():
    net = nn.Sequential(
        nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2), backend="eager")
    )
    net[2]._orig_mod.weight = net[0].weight
    names = parameter_names(net)
    assert names[net[0].weight] == ("0.weight", "2.weight")
    assert list(names.values())[2:] == [("1.weight",), ("1.bias",), ("2.bias",)]


NAMES = [
    ("layer1.0.conv1.weight",),
    ("layer1.0.conv2.weight",),
    ("layer2.conv.weight",),
    ("embed.weight", "head.weight"),
]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("auto", [0, 1, 2, 3]), ("layer1.*", [0, 1]), (["layer2.*", "*conv1*"], [0, 2]), (["*", "!*conv*"], [3]), (["!*conv*", "*"], [3]),
        ("!layer1.*", [2, 3]), ("head.*", [3]), ("embed.weight", [3]), (("*conv?.weight",), [0, 1]),
    ],
)  # fmt: skip
def test_match_patterns(params, expected):
    assert match_patterns(params, NAMES) == expected


@pytest.mark.parametrize(
    ("params", "nearest"),
    [
        ("layer1.0.conv3.weight", "layer1.0.conv"),
        (["*", "!heads.weight"], "head.weight"),
        ("Layer2*", "layer2"),
    ],
)
def test_a_pattern_without_a_match_names_what_is_there(params, nearest):
    with pytest.raises(
        NoTargetsError, match=r"matches none of the 4 weights: layer1\.0\.conv1\.weight"
    ) as error:
        match_patterns(params, NAMES)
    assert nearest in str(error.value).split("nearest")[1]


def test_a_pattern_where_there_is_nothing():
    with pytest.raises(NoTargetsError, match="there are none"):
        match_patterns("conv*", [], what="weights of two or more dimensions")


@pytest.mark.parametrize("params", [1, None, [], [1], "", "!", b"conv", {"a": 1}, ["auto", "!x"]])
def test_params_of_the_wrong_kind(params):
    with pytest.raises(ValueError, match="`params"):
        normalize_params(params)
