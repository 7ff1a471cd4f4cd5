"""The GAN: two optimizers under manual optimization, each with its own steps and curves."""

from __future__ import annotations

import gan_manual_optimization as gan
import pytest
import running

TINY = ("--preset", "tiny", "--accelerator", "cpu", "--logger", "none")


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("method", running.METHODS)
def test_each_method_trains_both_networks(method: str) -> None:
    run = gan.main([*TINY, "--method", method])
    assert run.trainer.global_step == 12  # steps of both optimizers
    assert (run.out / "samples.png").stat().st_size > 100
    for network in ("generator.1.weight", "discriminator.2.weight"):
        steps, _ = run.history.column(f"angular_update/{network}")
        assert len(steps) > 0


@pytest.mark.usefixtures("_no_pictures")
def test_discriminator_is_measured_only_at_its_own_steps() -> None:
    run = gan.main([*TINY, "--method", "decay"])
    generator, _ = run.history.column("angular_update/generator.1.weight")
    discriminator, _ = run.history.column("angular_update/discriminator.2.weight")
    assert list(generator) == list(range(8))  # 8 steps of one and 4 of the other make 12
    assert list(discriminator) == [1, 3, 5, 7]
