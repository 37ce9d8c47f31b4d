"""Which tensors share their channels, and the layers that make them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Widths:
    """Classes of tensors whose channels belong together one by one (union-find), and the layers they come from."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}
        self._owners: dict[int, list[nn.Module]] = {}
        self._seen: list[Tensor] = []  # alive, so that an id stays theirs

    def unite(self, tensors: Iterable[Tensor]) -> None:
        """Channel i of any of them is channel i of all."""
        first, *others = tensors
        for tensor in others:
            one, other = self.find(first), self.find(tensor)
            if one != other:
                self._above[other] = one
                self._owners[one] += self._owners.pop(other)

    def find(self, tensor: Tensor) -> int:
        """The class of a tensor, which is its own at first."""
        key = id(tensor)
        if key not in self._above:
            self._above[key], self._owners[key] = key, []
            self._seen.append(tensor)
        while self._above[key] != key:
            self._above[key] = key = self._above[self._above[key]]
        return key

    def own(self, layer: nn.Module, tensor: Tensor) -> None:
        """The channels of `tensor` are the outputs of `layer`."""
        self._owners[self.find(tensor)].append(layer)

    def owners(self, tensor: Tensor) -> list[nn.Module]:
        """The layers whose outputs these channels are; none if they are only parts of others joined."""
        return self._owners[self.find(tensor)]
