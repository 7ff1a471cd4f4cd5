"""Names of parameters and modules as a person wrote them, without what strategies and compilers
add."""

from __future__ import annotations

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """A parameter's or module's name without the wrappers of torch.compile, FSDP and activation
    checkpointing.

    Example:
        >>> clean_name("net._orig_mod.0._fsdp_wrapped_module.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


__all__ = ["WRAPPERS", "clean_name"]
