"""Which kernels run, and why: on the CPU torch's, unless a person asks for others."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry import kernel_choice
from lightning_normdyn.geometry.kernel_choice import KernelPath, choose, paths_in_words
from lightning_normdyn.geometry.triton_kernels import TritonKernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WEIGHT = torch.ones(3, 4)


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    """Neither of this process's settings nor of its machine."""
    monkeypatch.delenv("NORMDYN_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel_choice._missing.cache_clear()
    yield
    kernel_choice._missing.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with Triton and one GPU, as far as the choice asks."""
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    return monkeypatch


def test_a_plan_on_the_cpu_says_so():
    vectors = WeightVectors([WEIGHT], [Partition.filters((3, 4))])
    assert str(vectors.kernel_path) == "torch (the weights are on the CPU)"


def test_a_gpu_gets_triton(a_gpu):
    assert str(choose([WEIGHT], [None], GPU)) == "triton (NVIDIA Test)"


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("values", "hidden", "device", "reason"),
    [
        ([WEIGHT], [None], torch.device("mps"), "mps"),
        ([WEIGHT], [WEIGHT > 0], GPU, "mask"),
        ([], [], GPU, "no weights"),
        ([WEIGHT.to(torch.float8_e4m3fn)], [None], GPU, "float8"),
        ([WEIGHT, WEIGHT.to("meta")], [None, None], GPU, "several devices"),
        ([WEIGHT.as_subclass(type("Wrapped", (torch.Tensor,), {}))], [None], GPU, "Wrapped"),
    ],
)
def test_what_triton_cannot_take_goes_to_torch(values, hidden, device, reason):
    path = choose(values, hidden, device)
    assert path.name == "torch"
    assert reason in path.reason


def test_an_old_gpu_gets_torch(a_gpu):
    a_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose([WEIGHT], [None], GPU).reason == (
        "the GPU has compute capability 7.5, less than 8.0"
    )


def test_without_triton_torch_runs(a_gpu):
    a_gpu.setattr(kernel_choice, "find_spec", lambda name: None)
    assert choose([WEIGHT], [None], GPU).reason == "Triton is not installed"


def test_rocm_gets_torch(a_gpu):
    a_gpu.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in choose([WEIGHT], [None], GPU).reason


def test_a_person_can_force_either(a_gpu):
    a_gpu.setenv("NORMDYN_KERNELS", "torch")
    assert str(choose([WEIGHT], [None], GPU)) == "torch (NORMDYN_KERNELS=torch)"
    a_gpu.setenv("NORMDYN_KERNELS", "triton")
    with pytest.raises(NotSupportedError, match="TRITON_INTERPRET=1"):
        choose([WEIGHT], [None], CPU)
    a_gpu.setenv("TRITON_INTERPRET", "1")
    assert choose([WEIGHT], [None], CPU).reason == "its interpreter, on the CPU"


def test_what_is_forced_must_be_there(a_gpu):
    a_gpu.setattr(kernel_choice, "find_spec", lambda name: None)
    a_gpu.setenv("NORMDYN_KERNELS", "triton")
    with pytest.raises(NotSupportedError, match="not installed"):
        choose([WEIGHT], [None], GPU)


def test_an_unknown_setting_is_refused_with_both_names(monkeypatch):
    monkeypatch.setenv("NORMDYN_KERNELS", "cuda")
    with pytest.raises(NotSupportedError, match=r"'cuda'.*'torch'.*'triton'"):
        choose([WEIGHT], [None], CPU)


def test_paths_in_words(monkeypatch):
    gpu, cpu = KernelPath("triton", "NVIDIA Test"), KernelPath("torch", "several devices")
    assert paths_in_words([gpu, cpu, gpu]) == "triton (NVIDIA Test); torch (several devices)"
    monkeypatch.setattr(TritonKernels, "seconds", {"sums": 1.25, "write": 2.0})
    assert paths_in_words([gpu]) == "triton (NVIDIA Test), compiled in 3.2 s"


def test_a_compiler_that_failed_is_named(monkeypatch):
    monkeypatch.setattr(TritonKernels, "failure", "no ptxas")
    assert paths_in_words([KernelPath("triton", "NVIDIA Test")]) == "torch (no ptxas)"
