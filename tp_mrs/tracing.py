"""Show a model to Torch-Pruning's tracer as what its index mappings can follow, and fence off the rest.

Torch-Pruning reads couplings off autograd's graph by the names of its operations, and takes most of them for
element-wise ones. Reshaping, splitting, attention, or mixing along another axis than the channels it often misreads.
`trace` runs the model while it keeps track of which axis of each tensor holds the channels, and lets the tracer see
each operation as one of four kinds, whatever it is made of:

- *same*: channel i of all inputs is channel i of the output (element-wise, pooling, moving other axes about);
- *concatenation* along the channels, and *flattening* of the axes after them, which Torch-Pruning maps itself;
- *open*: inputs and output have widths of their own (reductions over channels);
- *fence*: anything else. What runs into a fence keeps its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architectures import LAYERS, prunable_attention, rigid_attention, stiff_modules
from .borrowing import borrowed, preserved_caches, thawed
from .errors import first_input
from .layouts import Layout, find_layout, numbered
from .widths import Widths

# --- how Torch-Pruning sees the nodes ------------------------------------------------------------------------------


class _Link(torch.autograd.Function):
    """Any computation, as one node of autograd's graph. It is never differentiated."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Tensor, ...], *inputs: Tensor) -> Any:
        """Give out copies of what was computed from the inputs, so that autograd takes them for new."""
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Never called."""
        raise NotImplementedError("a traced graph is for reading only")


class Same(_Link):
    """Torch-Pruning takes it for an element-wise operation, for want of another name."""


class ExpandFence(_Link):
    """Torch-Pruning takes it for an `expand` by its name; real ones are shown as `Same`."""


class SplitOpen(_Link):
    """Torch-Pruning takes it for a `split` by its name; real ones are fenced."""


class _NoLink(tp.pruner.BasePruningFunc):
    """The two sides of a node have nothing to do with each other. Different methods for them say so."""

    width: int | None = None

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        return layer

    def get_out_channels(self, layer: Any) -> int | None:
        return self.width

    def get_in_channels(self, layer: Any) -> int | None:
        return self.width


class _Fence(_NoLink):
    """Pruners leave a group alone when one of its members has a single channel left."""

    width = 1


def node_pruners() -> dict[type, Any]:
    """`customized_pruners` that give fences and open nodes their meaning."""
    return {tp.ops._ExpandOp: _Fence(), tp.ops._SplitOp: _NoLink()}


# --- tracing -------------------------------------------------------------------------------------------------------

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    "abs add addcdiv addcmul alpha_dropout atan ceil celu clamp clamp_max clamp_min clone contiguous cos cosine "
    "detach div double dropout dropout1d dropout2d dropout3d elu erf exp feature_alpha_dropout float floor gelu "
    "half hardshrink hardsigmoid hardswish hardtanh layer_norm leaky_relu lerp log log_softmax logsigmoid maximum "
    "minimum mish mul neg normalize pow radd rdiv relu relu6 rms_norm rmul rsqrt rsub rtruediv selu sigmoid sign "
    "silu sin softmax softplus softsign sqrt square sub tanh tanhshrink threshold to true_divide truediv type "
    "type_as where"
)
"""Each output depends on the inputs at its own place; or on others along an axis, whatever their order."""

POOLING = _names(
    "_pad _pad_circular adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d "
    "grid_sample interpolate lp_pool2d max_pool1d max_pool2d pad upsample"
)
"""Keep the axes of (N, C, …), and work within each channel."""

REDUCTIONS = _names("all amax amin any logsumexp max mean min norm prod std sum var var_mean")

MOVES = _names(
    "T chunk expand expand_as flatten flip getitem hsplit index_select mT moveaxis movedim narrow numpy_T permute "
    "pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape reshape_as roll rot90 select split "
    "split_with_sizes squeeze swapaxes swapdims t tensor_split tile transpose unbind unflatten unfold unsqueeze "
    "view view_as"
)
"""Put values in other places and do nothing else."""


CONCATENATIONS = {"cat", "concat", "concatenate"}

IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv"}
"""Operators that change their first operand; so do methods whose names end in an underscore."""


HALVING = {Layout.FIRST_HALF: (0,), Layout.SECOND_HALF: (1,), Layout.HALVES: (0, 1)}
"""Which halves of the channels a layout holds."""


def reasons_to_keep(model: nn.Module, example_inputs: Tensor) -> dict[str, str]:
    """Name of each layer whose outputs Torch-Pruning could not follow → what they run into, in words."""
    kept: dict[nn.Module, str] = {}
    with borrowed(model):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        trace(model, example_inputs, channel_groups={}, kept=kept)
    return {name: kept[module] for name, module in model.named_modules() if module in kept}


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    channel_groups: dict[nn.Module, int],
    kept: dict[nn.Module, str] | None = None,
) -> Any:
    """Run `model` for Torch-Pruning's tracer: a `forward_fn` for pruners, once `channel_groups` is given.

    Args:
        model: in eval mode.
        example_inputs: a tensor, or the model's positional or named arguments.
        channel_groups: the pruner's `out_channel_groups`. Gets an entry for each layer some of whose channels can only
            go together, as the halves of gated units, or what meets a concatenation of a tensor with itself.
        kept: gets an entry for each layer whose outputs run into a fence, and why.
    """
    inputs = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    tracer = _Tracer(model)
    with tracer.hooks(), thawed(model):  # Torch-Pruning traces by autograd, and overlooks frozen layers
        with tracer:
            outputs = model(**example_inputs) if isinstance(example_inputs, dict) else model(*inputs)
        shown = [tracer.final(tensor) for tensor in tensors_in(outputs) if tensor.requires_grad]
    channel_groups.update(tracer.repeated_layers())
    if kept is not None:
        kept.update(tracer.kept)
    return shown


class _Tracer(TorchFunctionMode):
    """Keeps the channel axis of every tensor that depends on a parameter, counted from the end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._inside = 0
        self._axes: dict[int, tuple[Tensor, int]] = {}  # keeps the tensors alive, so that an id stays theirs
        self._scattered: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._halved: dict[int, tuple[Tensor, bool]] = {}  # what was halved, and whether the halves met again
        self._halves: dict[int, set[tuple[int, int]]] = {}  # of which wholes a tensor contains which halves
        self._joined: dict[int, Tensor] = {}  # what was concatenated, until a layer takes it
        self._bare: dict[int, Tensor] = {}  # what was made of parameters alone
        self._cut: list[Tensor] = []  # halves, wholes, parts of concatenations and what was made of them
        self._grouped: list[Tensor] = []  # what comes in groups of channels, before and after it does
        self._joins: list[tuple[Tensor, list[Tensor]]] = []
        self._widths = Widths()
        self._stiff = stiff_modules(model)
        self.kept: dict[nn.Module, str] = {
            module: reason for module, reason in self._stiff.items() if isinstance(module, LAYERS)
        }
        self._readable = set(prunable_attention(model))
        self._rigid = set(rigid_attention(model))

    # modules that Torch-Pruning knows

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Leave the modules that Torch-Pruning knows to it, and fence their inputs where they mix another axis."""
        with ExitStack() as stack:
            stack.enter_context(preserved_caches(self._model))
            for module in self._model.modules():
                if isinstance(module, (*LAYERS, *NORMS)) or module in self._stiff or module in self._readable:
                    handles = (
                        module.register_forward_pre_hook(self._enter),
                        module.register_forward_hook(self._leave, always_call=True),
                    )
                    for handle in handles:
                        stack.callback(handle.remove)
                elif module in self._rigid:
                    stack.callback(module.register_forward_pre_hook(self._fence_inputs).remove)
            for attention in self._readable:
                stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
                attention.fused_attn = True  # fewer operations to misread
            yield

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._inside += 1
        if self._inside > 1 or not isinstance(first_input(module, inputs), Tensor) or not inputs[0].requires_grad:
            return inputs
        axis = self.axis(inputs[0])
        if module not in self._stiff and axis == expected_axis(module, inputs[0], axis):
            return inputs
        reason = self._stiff.get(module, f"{type(module).__name__} takes another axis for the channels")
        return (self.fence(inputs[0], reason), *inputs[1:])

    def _leave(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        if self._inside or not isinstance(output, Tensor):
            return
        if is_grouped(module):
            self._grouped += [inputs[0], output]
        if isinstance(module, LAYERS) or module in self._readable:
            self._set(output, -1 if not isinstance(module, nn.modules.conv._ConvNd) else 1 - output.dim())
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1:
                self._widths.unite([inputs[0], output])
            self._widths.own(module.proj if module in self._readable else module, output)
        elif isinstance(module, NORMS) and output.shape == inputs[0].shape:
            self._set(output, self.axis(inputs[0]))
            self._widths.unite([inputs[0], output])

    def _fence_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        reason = f"{type(module).__name__} takes sizes from its input"
        return tuple(self.fence(x, reason) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    def fence(self, tensor: Tensor, reason: str) -> Tensor:
        """The same values; the layers that made them keep their width."""
        self._keep([tensor], reason)
        return self._link(ExpandFence, [tensor], [tensor])[0]

    def final(self, output: Tensor) -> Tensor:
        """The model's output behind a fence, and behind others what has turned out to need one."""
        unclear = [whole for whole, met in self._halved.values() if not met]
        unclear += [joined for joined, parts in self._joins if self._repeats(joined, parts) == 0]
        cut = {self._widths.find(tensor) for tensor in self._cut}
        unclear += [tensor for tensor in self._grouped if self._widths.find(tensor) in cut]
        reason = "parts of the channels are joined with others or go separate ways"
        late = [self._open(self.fence(tensor, reason)) for tensor in unclear if tensor.requires_grad]
        return self._link(Same, [output], [*self._link(ExpandFence, [output], [output]), *late])[0]

    def _keep(self, tensors: Iterable[Tensor], reason: str) -> None:
        for tensor in tensors:
            origin = self._scattered[id(tensor)][1] if id(tensor) in self._scattered else tensor
            self.kept.update((layer, reason) for layer in self._widths.owners(origin) if layer not in self.kept)

    def repeated_layers(self) -> dict[nn.Module, int]:
        """Layers whose outputs can only go together with others, at regular distances → how many at a time."""
        found = {layer: 2 for whole, met in self._halved.values() if met for layer in self._widths.owners(whole)}
        for joined, parts in self._joins:
            times = self._repeats(joined, parts)
            if times > 1:
                found.update(dict.fromkeys(self._widths.owners(joined), times))
        return found

    def _repeats(self, joined: Tensor, parts: Sequence[Tensor]) -> int:
        """How often all channels of a concatenation occur in it; 0 if some do more often than others."""
        classes = [self._widths.find(part) for part in parts]
        if self._widths.find(joined) in classes:
            return 0
        inner = {self._repeats_within(part) for part in parts}
        if len(set(classes)) == 1:
            return len(classes) * inner.pop()
        uneven = len(set(classes)) < len(classes) or inner != {1}
        return 0 if uneven and self._widths.owners(joined) else 1

    def _repeats_within(self, part: Tensor) -> int:
        """How often the channels of a part occur in itself, it being a concatenation."""
        same = [join for join in self._joins if self._widths.find(join[0]) == self._widths.find(part)]
        times = {self._repeats(*join) for join in same}
        return max(times, default=1) if 0 not in times else 0

    # tensors

    def axis(self, tensor: Tensor) -> int | None:
        """Where the channels are, as a negative number; None if nobody knows."""
        known = self._axes.get(id(tensor))
        if known is not None:
            return known[1]
        if isinstance(tensor, nn.Parameter):
            longer = [dim for dim, size in enumerate(tensor.shape) if size > 1]
            return longer[-1] - tensor.dim() if longer else None
        return None

    def is_bare(self, tensor: Tensor) -> bool:
        """Whether it depends on parameters alone."""
        return isinstance(tensor, nn.Parameter) or id(tensor) in self._bare

    def _set(self, tensor: Tensor, axis: int | None) -> None:
        if axis is not None:
            self._axes[id(tensor)] = tensor, axis

    # operations

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tensors_in((args, kwargs)) if x.requires_grad]
        if self._inside or not operands or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        name = _name(function)
        if name in IN_PLACE or name.endswith("_"):
            return self._in_place(function, args, kwargs, operands)
        with torch.no_grad():
            output = function(*args, **kwargs)
        outputs = list(tensors_in(output))
        if not outputs:
            return output
        shown = self._show(_Call(name, function, args, kwargs, operands, outputs))
        if all(self.is_bare(x) for x in operands):
            self._bare.update((id(tensor), tensor) for tensor in shown)
        if isinstance(output, Tensor):
            return shown[0]
        return type(output)(shown) if isinstance(output, (tuple, list)) else output

    def _in_place(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]) -> Any:
        output = function(*args, **kwargs)
        changed = args[0]
        elementwise = _name(function).removeprefix("i").rstrip("_") in ELEMENTWISE
        same = _aligned(self, operands, changed) if elementwise else None
        self._axes.pop(id(changed), None)
        if same is not None and len(same[1]) == len(operands):
            self._set(changed, same[0])
            self._inherit([x for x in operands if x is not changed], changed)
        return output

    def _show(self, call: _Call) -> list[Tensor]:
        if call.name in ELEMENTWISE:
            return self._elementwise(call)
        if call.name in CONCATENATIONS:
            return self._concatenation(call)
        if call.name == "stack":
            return self._stack(call)
        if len([x for x in call.operands if not isinstance(x, nn.Parameter)]) <= 1 and call.operands[0] is call.first:
            if call.name in MOVES:
                return self._move(call)
            if call.name in REDUCTIONS:
                return self._reduction(call)
            if call.name in POOLING:
                return self._pooling(call)
        return self._fenced(call)

    def _fenced(self, call: _Call) -> list[Tensor]:
        inputs = [x for x in call.operands if not isinstance(x, nn.Parameter)]
        self._keep(inputs, f"{call.name} mixes or moves the channels")
        return self._link(ExpandFence, call.outputs, inputs) if inputs else call.outputs

    def _link(
        self, kind: type[_Link], outputs: Sequence[Tensor], inputs: Sequence[Tensor], axis: int | None = None
    ) -> list[Tensor]:
        shown = kind.apply(tuple(outputs), *inputs)
        for tensor in shown:
            self._set(tensor, axis)
            if kind is Same:
                self._inherit(inputs, tensor)
        return list(shown)

    def _elementwise(self, call: _Call) -> list[Tensor]:
        if len(call.outputs) != 1:
            return self._fenced(call)
        output = call.outputs[0]
        aligned = _aligned(self, call.operands, output)
        if aligned is None or _varies(call, output, aligned[0]):
            return self._fenced(call)
        axis, wide = aligned
        narrow = [x for x in call.operands if not any(x is y for y in wide) and not self.is_bare(x)]
        return self._link(Same, [output], [*wide, *map(self._open, narrow)], axis)

    def _open(self, tensor: Tensor) -> Tensor:
        return self._link(SplitOpen, [tensor], [tensor])[0]

    def _inherit(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """The output's channels come from where the inputs' came; see whether two halves meet in it."""
        self._widths.unite([output, *inputs])
        if any(id(x) in self._joined for x in inputs):
            self._joined[id(output)] = output
        halves = {half for x in inputs for half in self._halves.get(id(x), ())}
        self._halves[id(output)] = halves
        for whole in {whole for whole, side in halves if (whole, 1 - side) in halves}:
            self._halved[whole] = self._halved[whole][0], True

    def _pooling(self, call: _Call) -> list[Tensor]:
        source, output, axis = call.first, call.outputs[0], self.axis(call.first)
        anywhere = call.name in ("pad", "_pad")
        if axis is None or not (anywhere or axis == 1 - source.dim()) or output.dim() != source.dim():
            return self._fenced(call)
        if output.shape[axis] != source.shape[axis]:
            return self._fenced(call)
        return self._link(Same, call.outputs, [source], axis)

    def _reduction(self, call: _Call) -> list[Tensor]:
        source, axis = call.first, self.axis(call.first)
        dims = call.argument("dim", 1)
        if axis is None or dims is None or isinstance(dims, bool):
            return self._fenced(call)
        dims = {dim % source.dim() - source.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
        kept = call.outputs[0].dim() == source.dim()
        if axis in dims:
            return self._link(SplitOpen, call.outputs, [source], axis if kept else None)
        return self._link(Same, call.outputs, [source], axis if kept else axis + sum(dim > axis for dim in dims))

    def _concatenation(self, call: _Call) -> list[Tensor]:
        parts, output, dim = call.parts(), call.outputs[0], call.joined_dim()
        axis = self._common_axis(parts)
        if axis is None:
            return self._fenced(call)
        if axis != dim:
            return self._link(Same, [output], parts, axis)
        if any(self._halves.get(id(x)) for x in parts):  # Torch-Pruning can't tell their widths
            return self._fenced(call)
        return self._link(Same, [output], [self._join([self._column(x, axis) for x in parts])], axis)

    def _join(self, columns: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(columns), dim=1)
        self._joined[id(joined)] = joined
        self._joins.append((joined, list(columns)))
        self._cut += [joined, *columns]
        return joined

    def _stack(self, call: _Call) -> list[Tensor]:
        parts, axis = call.parts(), self._common_axis(call.parts())
        if axis is None:
            return self._fenced(call)
        return self._link(Same, call.outputs, parts, axis if call.joined_dim() < axis else axis - 1)

    def _common_axis(self, parts: Sequence[Tensor]) -> int | None:
        """Where all of them have their channels; None if some have them elsewhere, or none that can be pruned."""
        axes = {self.axis(x) if x.requires_grad else None for x in parts}
        return axes.pop() if len(axes) == 1 else None

    def _column(self, tensor: Tensor, axis: int) -> Tensor:
        """A stand-in of shape (1, channels, 1, 1), whose one wide axis nothing can mistake."""
        return self._link(Same, [tensor.new_zeros(1, tensor.shape[axis], 1, 1)], [tensor])[0]

    def _move(self, call: _Call) -> list[Tensor]:
        """Move channel numbers in place of the values, and see along which axis they lie.

        Where they lie along none, later moves go on with the numbers: they may yet bring them together again.
        """
        origin, numbers = self._numbered(call.first)
        axis = self.axis(origin)
        if axis is None:
            return self._fenced(call)
        width = origin.shape[axis]
        with torch.no_grad():
            moved = list(tensors_in(call.function(numbers, *call.args[1:], **call.kwargs)))
        shown = []
        for output, labels in zip(call.outputs, moved, strict=True):
            new_axis, layout = find_layout(labels, width) or (None, None)
            if new_axis is None or layout is None or not self._can_follow(call, origin, layout):
                shown += self._link(ExpandFence, [output], [origin])
            else:
                sources = self._laid_out(origin, axis, layout, output.shape[new_axis] // width)
                shown += self._link(Same, [output], sources, new_axis)
                if layout in HALVING:
                    self._note_half(origin, shown[-1], layout)
            if layout is not Layout.ONCE:
                self._scattered[id(shown[-1])] = shown[-1], origin, labels
        return shown

    def _can_follow(self, call: _Call, origin: Tensor, layout: Layout) -> bool:
        """Whether Torch-Pruning can follow the layout, and the model's code the pruning."""
        if layout is Layout.INTERLEAVED:
            return id(origin) not in self._joined and not self._halves.get(id(origin))
        if layout in HALVING:  # at a place that may stand in the code as a number, unless it is called a chunk
            return bool(self._widths.owners(origin)) and (layout is Layout.HALVES or call.name == "chunk")
        return True

    def _note_half(self, origin: Tensor, output: Tensor, layout: Layout) -> None:
        met = self._halved.get(id(origin), (origin, False))[1]
        self._halved[id(origin)] = origin, met or layout is Layout.HALVES
        self._halves[id(output)] = {(id(origin), side) for side in HALVING[layout]}
        self._cut += [origin, output]

    def _numbered(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor whose channels were moved about, and their numbers as they lie now."""
        if id(tensor) in self._scattered:
            return self._scattered[id(tensor)][1:]
        axis = self.axis(tensor)
        if axis is None:
            return tensor, tensor
        return tensor, numbered(tensor.shape, axis, tensor.device)

    def _laid_out(self, source: Tensor, axis: int, layout: Layout, times: int) -> list[Tensor]:
        """The channels in a layout, in terms that Torch-Pruning can follow."""
        if layout is Layout.ONCE:
            return [source]
        if layout is Layout.INTERLEAVED:
            block = source.new_zeros(1, source.shape[axis], times, 1)
            return [self._link(Same, [block], [source])[0].flatten(1)]
        column, half = self._column(source, axis), source.shape[axis] // 2
        if layout is Layout.TILED:
            return [self._join([column] * times)]
        return [column.narrow(1, side * half, half) for side in HALVING[layout]]


class _Call:
    """One call of a torch function: its arguments, the tensors among them that need a gradient, and what came out."""

    def __init__(self, name: str, function: Any, args: Any, kwargs: Any, operands: Any, outputs: Any) -> None:
        self.name, self.function, self.args, self.kwargs = name, function, args, kwargs
        self.operands: list[Tensor] = operands
        self.outputs: list[Tensor] = outputs

    @property
    def first(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def parts(self) -> list[Tensor]:
        """The tensors that are joined."""
        return list(self.first)

    def joined_dim(self) -> int:
        """The dimension along which they are, counted from the end of the output."""
        dims = self.outputs[0].dim()
        return int(self.argument("dim", 1) or 0) % dims - dims

    def argument(self, name: str, position: int) -> Any:
        value = self.kwargs.get(name)
        return value if value is not None or len(self.args) <= position else self.args[position]


def is_grouped(module: nn.Module) -> bool:
    """Whether channels are in groups of several, which Torch-Pruning would look for in each part of a concatenation."""
    if isinstance(module, nn.GroupNorm):
        return 1 < module.num_groups < module.num_channels
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.in_channels


def expected_axis(module: nn.Module, source: Tensor, axis: int | None) -> int:
    """Where a module that Torch-Pruning knows looks for the channels; 0, which no axis is, if that can't be said."""
    if isinstance(module, nn.LayerNorm):
        fits = axis is not None and tuple(module.normalized_shape) == (source.shape[axis],)
        return axis if fits and axis is not None else 0
    if isinstance(module, (nn.modules.conv._ConvNd, *NORMS)):
        return 1 - source.dim()
    return -1


def _aligned(tracer: _Tracer, operands: Sequence[Tensor], output: Tensor) -> tuple[int, list[Tensor]] | None:
    """The common channel axis of the operands of a broadcast, and those that have their channels along it.

    The others are the same for all channels. None if there is no common axis.
    """
    axes = [(x, tracer.axis(x)) for x in operands]
    streams = [(x, axis) for x, axis in axes if not tracer.is_bare(x)] or axes
    if any(axis is None or -axis > output.dim() for _, axis in streams):
        return None
    wide = {axis for x, axis in streams if axis is not None and x.shape[axis] == output.shape[axis]}
    if len(wide) != 1:
        return None
    common = wide.pop()
    joined = [x for x in operands if x.dim() >= -common and x.shape[common] == output.shape[common]]
    if any(tracer.axis(x) != common for x in joined):
        return None
    if any(x.dim() >= -common and x.shape[common] not in (1, output.shape[common]) for x in operands):
        return None
    return common, joined


def _varies(call: _Call, output: Tensor, axis: int) -> bool:
    """Whether a constant among the arguments differs from channel to channel."""
    constants = (x for x in tensors_in((call.args, call.kwargs)) if not x.requires_grad)
    return any(x.dim() >= -axis and x.shape[axis] == output.shape[axis] > 1 for x in constants)


def _name(function: Any) -> str:
    name = getattr(function, "__name__", "")
    if name == "__get__":  # a property, such as Tensor.mT
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name.strip("_") if name.startswith("__") else name


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
