"""Run a model again and again while a few weights change, without running again what doesn't depend on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class Shortcut:
    """Modules whose outputs stay as they are, and those outputs, once they are known.

    Args:
        modules: module → whether anything that does change needs its output; if not, its shape is enough.
    """

    def __init__(self, modules: Mapping[nn.Module, bool]) -> None:
        self.modules = modules
        self._again: dict[tuple[nn.Module, int], Callable[[], Tensor]] = {}

    @contextmanager
    def on(self, batch: int) -> Iterator[None]:
        """Inside, the modules return for this batch what they returned the first time."""
        with _replaced({module: self._remembering(module, batch) for module in self.modules}):
            yield

    def _remembering(self, module: nn.Module, batch: int) -> Forward:
        run = module.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if (module, batch) in self._again:
                return self._again[module, batch]()
            output: Tensor = run(*args, **kwargs)
            if self.modules[module]:
                again = output.detach().clone().clone  # copies, because the model may change them in place
            else:
                again = partial(
                    torch.empty_strided, output.shape, output.stride(), dtype=output.dtype, device=output.device
                )
            self._again[module, batch] = again
            return output

        return forward


def shortcut(model: nn.Module, example: Tensor) -> Shortcut:
    """The outermost modules whose outputs depend on no parameter that requires a gradient.

    Autograd tells: such outputs require no gradient; and one made to require it has none if nothing needs it. Only
    modules that run once and return a tensor of floating-point numbers count. None of a compiled model's do.

    Args:
        model: its modules, flags and gradients stay as they are.
        example: (N, C, H, W); what is found on it has to hold for all images.
    """
    if any(_is_compiled(module) for module in model.modules()):
        return Shortcut({})
    fixed, depends = _fixed_modules(model, example)
    if not depends:
        return Shortcut({})
    leaves: dict[nn.Module, Tensor] = {}

    def as_leaf(module: nn.Module) -> Forward:
        run = module.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            leaves[module] = run(*args, **kwargs).detach().requires_grad_()
            return leaves[module].clone()

        return forward

    with _replaced({module: as_leaf(module) for module in fixed}):
        output = model(example)
    found = torch.autograd.grad(output.sum(), list(leaves.values()), allow_unused=True) if leaves else ()
    return Shortcut({module: gradient is not None for module, gradient in zip(leaves, found, strict=True)})


def _fixed_modules(model: nn.Module, example: Tensor) -> tuple[list[nn.Module], bool]:
    """The outermost modules whose outputs depend on nothing that requires a gradient; and whether the model's does."""
    calls: Counter[nn.Module] = Counter()
    fixed: set[nn.Module] = set()

    def look(module: nn.Module, _args: object, output: object) -> None:
        calls[module] += 1
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            fixed.add(module)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        output = model(example)
    finally:
        for handle in handles:
            handle.remove()

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        if module in fixed and calls[module] == 1:
            yield module
        else:
            for child in module.children():
                yield from outermost(child)

    return list(dict.fromkeys(outermost(model))), output.requires_grad


def _is_compiled(module: nn.Module) -> bool:
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules with another `forward`."""
    before = [(module, module.__dict__.get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
