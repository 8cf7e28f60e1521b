"""The vocabulary of files that torch.save writes: storages, tensors as views of them, and nothing that runs.

Reading a pickle with `find_global` and `load_storage` gives containers with a `TensorRef` where torch would make a
tensor. A reference says where its numbers are; whether that is inside the storage is checked here, whether the storage
is as long as it says when the file is known.
"""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.checkpoint.pickle_values import Global, Inert, Record, kind_of
from jaxtune.checkpoint.safetensors import MAX_AXES
from jaxtune.errors import CheckpointError

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        **{name: name for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")},
        **{name: name for name in ("float16", "float32", "float64", "complex64", "complex128", "bool")},
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
        "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    }.items()
}
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

# Known, harmless and of no use here: what training runs put beside the weights. Nothing of it is kept.
INERT = (
    *("argparse.Namespace", "collections.Counter", "collections.defaultdict", "collections.deque"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath"),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "torch.device"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("int", "float", "dict", "list")),
)

# Tensors of other kinds: known, and refused with a way out.
_DENSE = "In torch, save dense tensors instead"
REFUSED = {
    "torch._utils._rebuild_qtensor": f"a quantised tensor. {_DENSE} (.dequantize())",
    "torch._utils._rebuild_sparse_tensor": f"a sparse tensor. {_DENSE} (.to_dense())",
    "torch._utils._rebuild_sparse_csr_tensor": f"a sparse tensor. {_DENSE} (.to_dense())",
    "torch._utils._rebuild_nested_tensor": f"a nested tensor. {_DENSE} (.to_padded_tensor(0))",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the meta device, which has no values. Save real ones",
    "torch._utils._rebuild_wrapper_subclass": f"a tensor subclass without a storage. {_DENSE}",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device. Move it to the CPU before saving",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device. Move it to the CPU first",
    **{f"torch.{name}Storage": f"a quantised storage. {_DENSE}" for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2")},
}


@dataclass(frozen=True)
class StorageType:
    """A class of storages; `dtype` is None for bytes that take the dtype of the tensor on them."""

    dtype: np.dtype | None


@dataclass(frozen=True)
class Storage:
    """One run of numbers in the file: its key, and how many bytes it must have."""

    key: str
    dtype: np.dtype | None
    num_bytes: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage; offset and strides count elements of `dtype`. Equal references are tied tensors."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor written out; an expanded one is larger than its storage."""
        return self.dtype.itemsize * math.prod(self.shape)


def find_global(module: str, name: str) -> Any:
    """What stands for a global of a file; None for what is not known.

    Raises:
        CheckpointError: a kind of tensor that is known and not read.
    """
    full = f"{module}.{name}"
    if full in REFUSED:
        raise CheckpointError(f"{full}: {REFUSED[full]}.")
    return _GLOBALS.get(full)


def load_storage(identity: Any) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, number of elements[, view]).

    Raises:
        CheckpointError: anything else.
    """
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise _unfit("a persistent id of a storage", kind_of(identity))
    _, kind, key, device, count, *view = identity
    if not isinstance(kind, Global) or not isinstance(kind.payload, StorageType):
        raise _unfit("a type of storage", kind_of(kind))
    if not isinstance(key, str) or not isinstance(device, str) or not _is_size(count):
        raise _unfit("key, device and size of a storage", f"{kind_of(key)}, {kind_of(device)}, {kind_of(count)}")
    if any(part is not None for part in view):
        raise CheckpointError(
            "a storage that is a view of another, as torch 0.3 wrote it: write it again with torch 2."
        )
    dtype = kind.payload.dtype
    return Storage(key, dtype, count * (dtype.itemsize if dtype else 1))


def _rebuild_tensor(storage, offset, shape, strides, *rest):
    """`rest`: requires_grad, hooks and metadata; the last says of conjugate and negative views."""
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise _unfit("a tensor on a typed storage", kind_of(storage))
    _check_rest(rest, 3)
    return _make_ref(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *rest):
    if not isinstance(storage, Storage):
        raise _unfit("a tensor on a storage", kind_of(storage))
    if not isinstance(dtype, Global) or not isinstance(dtype.payload, np.dtype):
        raise _unfit("a dtype", kind_of(dtype))
    _check_rest((requires_grad, hooks, *rest), 3)
    return _make_ref(storage, dtype.payload, offset, shape, strides)


def _rebuild_parameter(data, requires_grad=True, hooks=None, state=None):
    """A parameter is its tensor; what was attached to it is dropped."""
    if not isinstance(data, TensorRef):
        raise _unfit("a parameter made of a tensor", kind_of(data))
    return data


def _rebuild_from_type(function, kind, arguments, state):
    """A tensor that carries attributes."""
    known = isinstance(function, Global) and function.name in _REBUILDERS and isinstance(arguments, tuple)
    if not known or not isinstance(kind, Global) or kind.name not in _TENSOR_TYPES:
        raise _unfit("a torch.Tensor with attributes", f"{kind_of(function)} for {kind_of(kind)}")
    return function.call(*arguments)


def _make_ref(storage, dtype, offset, shape, strides):
    """A checked reference: shape and strides must stay inside the storage."""
    for what, sizes in (("shape", shape), ("strides", strides)):
        if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_AXES or not all(map(_is_size, sizes)):
            raise _unfit(f"{what} of at most {MAX_AXES} integers, none negative", kind_of(sizes))
    if len(shape) != len(strides) or not _is_size(offset):
        raise _unfit("an offset and one stride an axis", f"{len(shape)} axes, {len(strides)} strides")
    if dtype.itemsize * math.prod(max(size, 1) for size in shape) >= 2**63:
        raise _unfit("fewer than 2^63 bytes", f"the shape {list(shape)}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    room = storage.num_bytes // dtype.itemsize
    if math.prod(shape) and last >= room:
        raise CheckpointError(
            f"a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} reaches element {last} of a "
            f"storage of {room}. The file is damaged or hostile."
        )
    # The stride of an axis of length 1 is never used; settled, so that equal views compare equal.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    return TensorRef(storage, dtype, offset, tuple(shape), strides)


def _check_rest(rest, limit):
    if len(rest) > limit:
        raise _unfit(f"at most {limit} further arguments of a tensor", f"{len(rest)}")
    if len(rest) == limit and rest[-1]:
        raise CheckpointError(
            "a conjugate or negative view. In torch, call .resolve_conj().resolve_neg() and save again."
        )


def _make_record(items=()):
    """An ordered dict, filled at once by files of Python 2."""
    record = Record()
    if not isinstance(items, (list, tuple)):
        raise _unfit("an ordered dict of pairs", kind_of(items))
    for pair in items:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise _unfit("an ordered dict of pairs of text and value", kind_of(pair))
        record[pair[0]] = pair[1]
    return record


def _make_size(sizes=()):
    if not isinstance(sizes, (tuple, list)):
        raise _unfit("a torch.Size of integers", kind_of(sizes))
    return tuple(sizes)


def _is_size(value):
    return type(value) is int and 0 <= value < 2**63


def _unfit(expected, found):
    return CheckpointError(f"expected {expected}, found {found}. The file is damaged or hostile; download it again.")


def _inert(name):
    return Global(name, lambda *arguments: Inert(name), is_class=True)


_REBUILDERS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_GLOBALS = {
    **{name: _inert(name) for name in INERT},
    **{name: Global(name, function) for name, function in _REBUILDERS.items()},
    **{
        f"torch._tensor.{name}": Global(f"torch._tensor.{name}", _rebuild_from_type)
        for name in ("_rebuild_from_type", "_rebuild_from_type_v2")
    },
    **{name: Global(name) for name in _TENSOR_TYPES},
    **{f"torch.{name}": Global(f"torch.{name}", payload=dtype) for name, dtype in DTYPES.items()},
    **{
        f"{module}.{name}": Global(f"{module}.{name}", payload=StorageType(DTYPES[dtype]))
        for module in ("torch", "torch.cuda")
        for name, dtype in STORAGES.items()
    },
    "torch.storage.UntypedStorage": Global("torch.storage.UntypedStorage", payload=StorageType(None)),
    "torch.Size": Global("torch.Size", _make_size, is_class=True),
    "collections.OrderedDict": Global("collections.OrderedDict", _make_record, is_class=True),
}
