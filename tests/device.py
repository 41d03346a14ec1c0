"""A device that is none: tensors that claim to be on it, refuse what a GPU refuses, and count.

    with imitated_device() as counts:
        train(Args(device=DEVICE, ...))

Its tensors hold a tensor of the CPU. A kernel that gets tensors of both places raises, as on a GPU.
`counts.waits` has the lines of the project at which a GPU would make the CPU wait: what fetches a
result (`.cpu()`, `.item()`), and what has to know a size first (a boolean index, `nonzero`).
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = str(Path(__file__).parents[1])
DEVICE = "imitated"
_setup_privateuseone_for_python_backend(DEVICE)
THERE = torch.device(DEVICE, 0)
SIZES_UNKNOWN = {"nonzero", "masked_select", "_unique2", "equal", "multinomial"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device; `held` is on the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=THERE,
            requires_grad=False,
        )
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save what is held, so that a checkpoint is one of the CPU's."""
        return self.held.detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("a tensor of the imitated device outlived it")


def is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def hold(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def put(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def line_of_project() -> str:
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == Path(ROOT):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Kernels(TorchDispatchMode):
    """Runs each kernel on what its tensors hold."""

    def __init__(self, counts: SimpleNamespace):
        super().__init__()
        self.counts = counts

    def wait(self) -> None:
        self.counts.waits[line_of_project()] += 1

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, OnDevice)]
        device = kwargs.get("device")
        if name == "_to_copy":
            result = op(hold(args[0]), **{k: x for k, x in kwargs.items() if k != "device"})
            if is_there(device) or (device is None and there):
                return OnDevice(result)
            if there:
                self.wait()
            return result
        if name == "copy_":
            target, source = args[:2]
            if isinstance(source, OnDevice) and not isinstance(target, OnDevice):
                self.wait()
            hold(target).copy_(hold(source))
            return target
        if not there and not is_there(device):
            return op(*args, **kwargs)
        if any(x.dim() > 0 and not isinstance(x, OnDevice) for x in tensors):
            raise RuntimeError(f"{name} got tensors of two devices at {line_of_project()}")
        by_mask = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name == "_local_scalar_dense" or name in SIZES_UNKNOWN or by_mask:
            self.wait()
        else:
            self.counts.kernels += 1
        if device is not None:
            kwargs = kwargs | {"device": "cpu"}
        result = op(*tree_map(hold, args), **tree_map(hold, kwargs))
        by_held = {id(x.held): x for x in there}  # an in-place kernel gives its argument back
        return tree_map(lambda x: by_held.get(id(x)) if id(x) in by_held else put(x), result)


class Functions(TorchFunctionMode):
    """Serves what never becomes a kernel."""

    def __init__(self, counts: SimpleNamespace):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function == torch.Tensor.data.__set__ and isinstance(args[1], OnDevice):
            args[0].held = args[1].held
            return None
        if args and isinstance(args[0], OnDevice):
            if function in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError(f"a tensor of the device is no array at {line_of_project()}")
            if function is torch.Tensor.tolist:
                self.counts.waits[line_of_project()] += 1
                return args[0].held.tolist()
        return function(*args, **kwargs)


@contextlib.contextmanager
def imitated_device():
    """Make the device, and count on it; `counts.kernels` is the number of kernels launched."""
    counts = SimpleNamespace(waits=Counter(), kernels=0)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            with Functions(counts), Kernels(counts):
                yield counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
