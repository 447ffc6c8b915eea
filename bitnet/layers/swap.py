"""THE seam: every change of a linear layer, for training, packing or export, goes through ``swap_linears``."""

from collections.abc import Callable

from torch import nn

SKIPPED = frozenset({"lm_head", "output", "embed_out"})
"""Output heads by their usual names: they stay in high precision in every published recipe."""


def swap_linears(
    model: nn.Module,
    replace: Callable[[str, nn.Linear], nn.Module | None],
    skip: frozenset[str] = SKIPPED,
) -> list[str]:
    """Put ``replace(name, linear)`` in the place of each ``nn.Linear`` below ``model``; return the changed names.

    ``name`` is the dotted path. Linears whose last path component is in ``skip`` are left alone, and so is one for
    which ``replace`` returns ``None`` or the linear itself. Works on any ``nn.Module``; a linear that is registered
    under several names is replaced under each of them by the same module.
    """
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    made: dict[int, nn.Module | None] = {}
    changed = []
    for name, linear in found:
        if name.rpartition(".")[2] in skip or not name:
            continue
        if id(linear) not in made:
            made[id(linear)] = replace(name, linear)
        new = made[id(linear)]
        if new is not None and new is not linear:
            model.set_submodule(name, new)
            changed.append(name)
    return changed
