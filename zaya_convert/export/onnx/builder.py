"""``Builder``: an ONNX graph under construction; values are known by their names.

Weights are initializers whose bytes lie in external files, at places that are known beforehand;
the same bytes may serve several initializers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from zaya_convert.export.arrays import Array

CONTRIB = "com.microsoft"
# RMSNormalization came with opset 23; onnxruntime has it since 1.23 and reads IR 11.
OPSET, IR_VERSION = 23, 11
END = (1 << 63) - 1  # of a slice: as far as there is

_DTYPES = {"F32": TensorProto.FLOAT, "U8": TensorProto.UINT8}


@dataclass(frozen=True, slots=True)
class Located:
    """Where an array's bytes begin: the name of a file beside the model, and an offset in it."""

    file: str
    offset: int


Locate = Callable[[str], Located]


class Builder:
    """Nodes and initializers, in the order in which they are asked for.

    Attributes:
        scope: what the names of new nodes and values begin with.
    """

    def __init__(self, locate: Locate) -> None:
        self.scope = ""
        self._locate = locate
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """An input of the graph."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare a value, made under this name, as an output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def op(
        self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """A node with one output, which gets a name of its own unless ``out`` gives it one."""
        return self.ops(kind, *inputs, out=(out,), domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, out: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with as many outputs as ``out`` has names; "" asks for a new one."""
        node = self._new(kind)
        outputs = [name or f"{node}:{i}" for i, name in enumerate(out)]
        self._nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=node, domain=domain, **attributes)
        )
        return outputs

    def ints(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self._constant(np.array(values, np.int64), "x".join(map(str, values)))

    def scalar(self, value: int | float | bool, dtype: type[np.generic]) -> str:
        """A constant without dimensions."""
        return self._constant(np.array(value, dtype), f"{value}.{np.dtype(dtype).name}")

    def floats(self, values: np.ndarray, name: str) -> str:
        """A constant float array, which has a name of its own."""
        return self._constant(values, name)

    def weight(
        self,
        array: Array,
        *,
        name: str = "",
        dims: Sequence[int] | None = None,
        expert: int | None = None,
    ) -> str:
        """An initializer on the bytes of an external array.

        Args:
            name: instead of the array's own.
            dims: instead of the array's own, for as many bytes.
            expert: only one item of the array's first dimension.
        """
        name = name or (array.name if expert is None else f"{array.name}.{expert}")
        if name in self._initializers:
            return name
        place, size = self._locate(array.name), array.bytes
        begin = place.offset
        if expert is not None:
            size //= array.shape[0]
            begin += expert * size
        shape = array.shape if expert is None else array.shape[1:]
        tensor = TensorProto(
            name=name,
            data_type=_DTYPES[array.dtype],
            dims=shape if dims is None else dims,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", place.file), ("offset", begin), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished model; ``metadata`` goes into its ``metadata_props``."""
        initializers = list(self._initializers.values())
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, initializers)
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(
            graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="zaya-convert"
        )
        helper.set_model_props(model, metadata)
        return model

    def _constant(self, value: np.ndarray, name: str) -> str:
        name = f"constant.{name}"
        if name not in self._initializers:
            # not through ascontiguousarray, which gives scalars a dimension
            self._initializers[name] = onnx.numpy_helper.from_array(value, name)
        return name

    def _new(self, kind: str) -> str:
        base = f"{self.scope}{kind}"
        self._counts[base] = count = self._counts.get(base, -1) + 1
        return f"{base}.{count}" if count else base
