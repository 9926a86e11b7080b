"""Any other PyTorch module as something to export: what `pkg:factory` makes.

The factory takes nothing and gives `(module, inputs)` or `(module, inputs, names)`: an
`nn.Module`, a tuple of example tensors for its `forward`, and a dict with any of `input_names`,
`output_names` (lists) and `dynamic_axes` ({input name: {axis: name of the size}}).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UnsupportedError, UsageError
from .exporters import Axes, Case, Subject, quiet
from .torch_weights import round_to

if TYPE_CHECKING:
    import torch

_KEYS = {"input_names", "output_names", "dynamic_axes"}
_FOLDED = 1 << 30  # bytes of parameters up to which an exporter may fold them


def subject(name: str, dtype: str) -> Subject:
    """What the factory `pkg:factory` makes, its weights rounded to `dtype`, and its results.

    Raises UsageError for a name that leads to no such function, or for what it gives.
    """
    module, inputs, options = _made(name)
    round_to(module, dtype)
    names = _input_names(name, module, inputs, options)
    axes = _input_axes(name, names, inputs, options)
    wrapped = _wrapped(module)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    with quiet():
        results = _results(wrapped, inputs)
        outputs = _output_names(name, module, inputs, len(results), options)
        cases = [_case(names, inputs, outputs, results)]
        if axes:
            grown = _grown(names, inputs, axes)
            cases.append(_case(names, grown, outputs, _other_results(name, wrapped, grown)))
    axes = axes | _open_axes(cases)
    return Subject(wrapped, inputs, names, outputs, axes, tuple(cases), large=size > _FOLDED)


def _made(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], Mapping[str, Any]]:
    import torch

    made = _factory(name)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UsageError(f"--module {name}: it must return (module, inputs) or, third, a dict")
    module, inputs, options = made if len(made) == 3 else (*made, {})
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"--module {name}: the first of what it returns is no torch.nn.Module")
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    if not isinstance(inputs, Sequence) or not all(isinstance(t, torch.Tensor) for t in inputs):
        raise UsageError(f"--module {name}: the second of what it returns is no tuple of tensors")
    if not isinstance(options, Mapping) or not options.keys() <= _KEYS:
        raise UsageError(
            f"--module {name}: the third of what it returns is no dict of "
            f"{', '.join(sorted(_KEYS))}"
        )
    return module.eval(), tuple(inputs), options


def _factory(name: str) -> Any:
    package, _, function = name.partition(":")
    if not package or not function:
        raise UsageError(f"--module {name}: give it as pkg:factory, a module's name and a function")
    with _importing_from_here():
        try:
            module = import_module(package)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--module {name}: {error}; it is looked for in {os.getcwd()} and among the "
                "installed packages"
            ) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise UsageError(f"--module {name}: {package} has no function {function!r}")
    return factory


@contextmanager
def _importing_from_here() -> Iterator[None]:
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _wrapped(module: torch.nn.Module) -> torch.nn.Module:
    import torch

    class Positional(torch.nn.Module):  # type: ignore[misc]
        """Any number of tensors -> a tuple of all tensors in the module's result."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(_leaves(self.module(*inputs)))

    return Positional().eval()


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif value is not None:
        raise UnsupportedError(
            f"the module's result has a {type(value).__name__}; only tensors, in lists, tuples and "
            "dicts, can be exported"
        )


def _results(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    import torch

    with torch.no_grad():
        return [t.numpy().copy() for t in module(*inputs)]


def _case(
    names: Sequence[str], inputs: Sequence[torch.Tensor], outputs: Sequence[str], results: Any
) -> Case:
    feeds = {name: t.numpy().copy() for name, t in zip(names, inputs, strict=True)}
    return Case(feeds, dict(zip(outputs, results, strict=True)))


def _input_names(
    name: str, module: torch.nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]
) -> tuple[str, ...]:
    """As given, else those of the parameters of `forward`."""
    given = options.get("input_names")
    if given is None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        found = [p.name for p in parameters if p.kind in kinds][: len(inputs)]
        given = found + [f"input{i}" for i in range(len(found), len(inputs))]
    if len(given) != len(inputs):
        raise UsageError(
            f"--module {name}: {len(given)} input_names, and {len(inputs)} example inputs"
        )
    return tuple(given)


def _output_names(
    name: str, module: torch.nn.Module, inputs: Any, count: int, options: Mapping[str, Any]
) -> tuple[str, ...]:
    given = options.get("output_names")
    if given is None:
        return ("output",) if count == 1 else tuple(f"output{i}" for i in range(count))
    if len(given) != count:
        raise UsageError(f"--module {name}: {len(given)} output_names, and {count} results")
    return tuple(given)


def _input_axes(
    name: str, names: Sequence[str], inputs: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> dict[str, Mapping[int, str]]:
    given: Axes = options.get("dynamic_axes", {})
    ranks = {n: t.ndim for n, t in zip(names, inputs, strict=True)}
    for key, axes in given.items():
        if key not in ranks:
            continue  # a result's: found out by another run
        if not isinstance(axes, Mapping) or not all(0 <= a < ranks[key] for a in axes):
            raise UsageError(
                f"--module {name}: dynamic_axes of {key} is no dict from an axis, below "
                f"{ranks[key]}, to the name of its size"
            )
    return {key: axes for key, axes in given.items() if key in ranks and axes}


def _grown(names: Sequence[str], inputs: Sequence[torch.Tensor], axes: Axes) -> list[torch.Tensor]:
    """The example inputs with every open size one larger: the first slice once more."""
    import torch

    grown = []
    for name, tensor in zip(names, inputs, strict=True):
        for axis in axes.get(name, {}):
            tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        grown.append(tensor)
    return grown


def _other_results(name: str, module: torch.nn.Module, inputs: Sequence[Any]) -> list[Any]:
    try:
        return _results(module, inputs)
    except Exception as error:  # any: the module's own code
        raise UsageError(
            f"--module {name}: with every size of dynamic_axes one larger its forward fails "
            f"({error}); leave those out that must be as they are"
        ) from error


def _open_axes(cases: Sequence[Case]) -> dict[str, dict[int, str]]:
    """The sizes of results that changed with the inputs'."""
    first, last = cases[0].wanted, cases[-1].wanted
    return {
        name: {
            axis: f"{name}_{axis}"
            for axis, (a, b) in enumerate(zip(first[name].shape, last[name].shape, strict=True))
            if a != b
        }
        for name in first
    }
