"""Which parts of a network repeat: the unit that is compiled, and whose activations are computed again.

A block is small enough that all of its kind share one compiled graph, and large enough that keeping only what goes
into it saves most of the memory.
"""

from collections import Counter
from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network, in its own order; none lies within another.

    timm's blocks say what they are by the drop path that each has, whatever its rate. A network without drop paths is
    searched for layers of one class that stand in a row.

    Returns:
        At least two modules, or none.
    """
    marked = list(_outermost_with_drop_path(network))
    return marked if len(marked) > 1 else _stacked(network)


def _outermost_with_drop_path(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if (
            any(hasattr(child, name) for name in ("drop_path", "drop_path1"))
            and next(child.parameters(), None) is not None
        ):
            yield child
        else:
            yield from _outermost_with_drop_path(child)


def _stacked(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []

    def search(module: nn.Module, stands_in_a_row: bool) -> bool:
        """Whether a block was found in a module, or is it."""
        row = isinstance(module, _CONTAINERS)
        inside = [search(child, row) for child in module.children()]
        if any(inside):
            return True
        is_block = stands_in_a_row and not row and len(inside) > 0 and next(module.parameters(), None) is not None
        if is_block:
            found.append(module)
        return is_block

    search(network, stands_in_a_row=False)
    classes = Counter(type(module) for module in found)
    return [module for module in found if classes[type(module)] > 1]
