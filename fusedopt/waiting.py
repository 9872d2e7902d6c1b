"""Modules that wait for the updates of their own parameters before they compute with them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from .offloaded import Offloaded

# Of torch's modules, those that leave their parameters to the modules that they hold.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def hook(model: nn.Module, offloaded: Offloaded) -> None:
    """Each module waits in its forward, and before its state is saved or loaded."""
    for module in model.modules():
        waits = _Waits(offloaded)
        if any(True for _ in _used_by(module)):
            forward = module.register_forward_pre_hook(waits.before_forward, prepend=True)
            offloaded.handles.append(forward)
        offloaded.handles += [
            module.register_state_dict_pre_hook(waits.before_state_dict),
            module.register_load_state_dict_pre_hook(waits.before_state_dict),
        ]


class _Waits:
    """Keeps the optimizer alive while a step is under way, and else nothing. A copy of the module
    has no optimizer, and does not wait."""

    def __init__(self, offloaded: Offloaded | None = None) -> None:
        self._offloaded = None if offloaded is None else weakref.ref(offloaded)
        self._under_way = None if offloaded is None else offloaded._queue.under_way

    def __reduce__(self) -> tuple[type[_Waits], tuple[()]]:
        return _Waits, ()

    @_disable_dynamo
    def before_forward(self, module: nn.Module, _: Any) -> None:
        # FSDP gathers parameters in a stream of its own.
        self._wait(_used_by(module), _is_gathered(module))

    def before_state_dict(self, module: nn.Module, *_: Any) -> None:
        self._wait(module.parameters(), False)

    def _wait(self, params: Iterator[Tensor], on_host: bool) -> None:
        offloaded = None if self._offloaded is None else self._offloaded()
        if offloaded is not None:
            offloaded.wait_for(params, on_host)


def _used_by(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that the forward of a module reads by itself. Of torch's own modules, some
    read those of the modules that they hold (MultiheadAttention); and FSDP gathers those of all
    that it does not gather elsewhere."""
    if _is_gathered(module):
        yield from _gathered_with(module)
    else:
        is_torchs = type(module).__module__.startswith("torch.nn.modules")
        recurse = is_torchs and not isinstance(module, _CONTAINERS)
        yield from module.parameters(recurse=recurse)


def _gathered_with(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not _is_gathered(child):
            yield from _gathered_with(child)


def _is_gathered(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
