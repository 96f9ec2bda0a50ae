"""``OnnxModel``: the graph of an ONNX folder, run by onnxruntime, with the methods of ``Model``.

What runs is ``model.onnx`` itself: its nodes, in its order, on its bytes, with onnxruntime's usual
options. Only two things differ, neither of which changes a bit of the logits (a test compares them
with the untouched file's). The graph is cut in two where rows [n, d] enter the head, so that the
logits of a long text need never be held at once. And what the routers chose is read off.

onnxruntime copies quantized weights into an order of its own when it loads them, so a model takes
its own size in memory. Without these copies weights stay mapped from the file, but other kernels
run, which round no activations: not what is deployed, and just what ``exact`` asks for. There it
costs about half as much time again, and the head is dequantized as a whole for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export.onnx import configs, graph, read
from zaya_convert.runtime.inputs import (
    check_block,
    check_ids,
    check_sequences,
    full_mask,
    join_valid,
    used_columns,
)
from zaya_convert.runtime.model import PADDING, Evaluation, Output

_PAST, _PRESENT = "past_key_values.", "present."
_COLUMNS = 512  # of a sequence in one pass: bounds the memory of a long one
_UNCOPIED_KEY = "session.disable_prepacking"
_ERRORS_ONLY = 3  # onnxruntime's log level


@dataclass
class OnnxStates:
    """A cache: the graph's own states.

    Attributes:
        length: columns seen so far.
        valid: [B, length] booleans, False where a column is padding; None when none is.
        arrays: by name of the graph's inputs; empty before the first block.
    """

    config: ModelConfig
    length: int = 0
    valid: Tensor | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def select(self, rows: Sequence[int] | Tensor) -> OnnxStates:
        """The states of the given rows in the given order; the two share nothing afterwards."""
        index = torch.as_tensor(rows, dtype=torch.long)
        valid = None if self.valid is None else self.valid[index]
        kept = {name: array[index.numpy()] for name, array in self.arrays.items()}
        return OnnxStates(self.config, self.length, valid, kept)

    def join(self, other: OnnxStates) -> OnnxStates:
        """Both batches as one, the rows of ``other`` behind, as ``Cache.join`` does it.

        The graph counts positions in columns, so the keys of a batch that moves are turned along:
        to the last bits, what is generated may depend on it.
        """
        parts = (self, other)
        width = max(used_columns(part.length, part.valid) for part in parts)
        rows = [len(next(iter(part.arrays.values()))) for part in parts]
        valid = join_valid([(part.length, part.valid) for part in parts], rows, width)
        moved = [part._moved(width) for part in parts]
        arrays = {name: np.concatenate([part[name] for part in moved]) for name in self.arrays}
        return OnnxStates(self.config, width, valid, arrays)

    def _moved(self, width: int) -> dict[str, np.ndarray]:
        """The arrays with ``width`` columns, the last ones, zeros before the first."""
        moved = dict(self.arrays)
        shift = width - self.length
        if not shift:
            return moved
        for layer, theta in enumerate(self.config.rope_thetas):
            for state in ("key", "value"):
                name = f"{_PAST}{layer}.{state}"
                columns = np.pad(
                    moved[name][:, :, -width:], ((0, 0), (0, 0), (max(shift, 0), 0), (0, 0))
                )
                if state == "key":
                    columns = _turned(columns, shift, theta, self.config.rotary_dim)
                moved[name] = columns
        return moved


class OnnxModel:
    """An opened ONNX folder, runnable.

    Args:
        exact: compute with fp32 activations, for proofs of the stored weights; the deployed graph
            may round activations to 8 bits.

    Raises:
        UsageError: onnxruntime is missing.
        InputError: onnxruntime cannot run the graph.
    """

    def __init__(self, checkpoint: Checkpoint, exact: bool = False) -> None:
        runtime = _onnxruntime()
        self.config = checkpoint.config
        self.name = f"onnxruntime {runtime.__version__}, {'exact' if exact else 'as deployed'}"
        folder = checkpoint.path / configs.FOLDER
        path = folder / configs.NAMES["optimum"]
        # opening the checkpoint has shown that it can be parsed
        whole = read.exact_graph(checkpoint) if exact else path.read_bytes()
        body, head = _cut(onnx.ModelProto.FromString(whole), self._state_shapes())
        self._outputs = [value.name for value in body.graph.output]
        self._body, self._head = (
            _session(runtime, part, str(folder), mapped=exact) for part in (body, head)
        )

    def new_cache(self) -> OnnxStates:
        """Empty states; they take the batch size of the first block they meet."""
        return OnnxStates(self.config)

    def forward(
        self,
        ids: Tensor,
        *,
        cache: OnnxStates | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Output:
        """Run a block of tokens, continuing from ``cache`` and advancing it, as ``Model`` does."""
        check_block(ids)
        states = self.new_cache() if cache is None else cache
        passed = self._run(ids, states, mask, 1 if last_only else 0)
        logits = self.logits(passed.rows).view(len(ids), -1, self.config.vocab_rows)
        shape = (self.config.layers, *ids.shape)
        return Output(logits, passed.routes.view(shape), passed.weights.view(shape))

    def evaluate(
        self, sequences: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Run whole sequences, one after the other and a long one in parts.

        Args:
            progress: called with (sequences done, sequences).
        """
        check_sequences(sequences)
        hidden: list[Tensor] = []
        passes: list[_Pass] = []
        for done, sequence in enumerate(sequences, 1):
            parts = self._parts(sequence)
            hidden.append(torch.cat([part.rows for part in parts]))
            passes += parts
            if progress is not None:
                progress(done, len(sequences))
        routes = torch.cat([part.routes for part in passes], dim=1)
        return Evaluation(hidden, routes, torch.cat([part.weights for part in passes], dim=1))

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: hidden states [n, d] → fp32 logits [n, V]; call it on chunks of many rows."""
        (name,) = (value.name for value in self._head.get_inputs())
        with _named_errors():
            (found,) = self._head.run(None, {name: hidden.numpy()})
        return torch.from_numpy(found)

    def _parts(self, sequence: Tensor) -> list[_Pass]:
        """A whole sequence in parts that follow each other."""
        states = self.new_cache()
        return [self._run(part[None], states, None, 0) for part in sequence.split(_COLUMNS)]

    def _run(self, ids: Tensor, states: OnnxStates, mask: Tensor | None, keep: int) -> _Pass:
        """Run a block and advance ``states``; rows of the last ``keep`` columns, 0 for all."""
        check_ids(ids, self.config.vocab_rows)
        mask = full_mask(ids, states.length, states.valid, mask)
        width = states.length + ids.shape[1]
        seen = torch.ones(len(ids), width) if mask is None else mask
        feeds = {
            "input_ids": ids.long().numpy(),
            "attention_mask": seen.long().numpy(),
            **(states.arrays or self._nothing(len(ids))),
        }
        # GroupQueryAttention on the CPU continues several sequences by one token at a time only
        alone = states.length > 0 and ids.shape[1] > 1
        found = self._compute(feeds, keep, 1 if alone else len(ids))
        states.length, states.valid = width, mask
        states.arrays = {name: found[_present(name)] for name in self._state_shapes()}
        rows, *routers = (value for name, value in found.items() if not name.startswith(_PRESENT))
        routes, weights = _routes(routers)
        if mask is not None:
            routes.masked_fill_(~mask[:, -ids.shape[1] :].flatten(), PADDING)
        return _Pass(torch.from_numpy(rows), routes, weights)

    def _compute(
        self, feeds: dict[str, np.ndarray], keep: int, together: int
    ) -> dict[str, np.ndarray]:
        """The body's outputs for a batch, of which so many sequences run ``together``."""
        kept = {"num_logits_to_keep": np.array(keep, np.int64)}
        with _named_errors():
            runs = [
                self._body.run(None, kept | {n: a[row : row + together] for n, a in feeds.items()})
                for row in range(0, len(feeds["input_ids"]), together)
            ]
        # all outputs have the batch, or rows in its order, as their first dimension
        joined = runs[0] if len(runs) == 1 else map(np.concatenate, zip(*runs, strict=True))
        return dict(zip(self._outputs, joined, strict=True))

    def _nothing(self, batch: int) -> dict[str, np.ndarray]:
        """States before the first token."""
        return {
            name: np.zeros((batch, *shape), np.float32)
            for name, shape in self._state_shapes().items()
        }

    def _state_shapes(self) -> dict[str, Sequence[Any]]:
        """By name of the graph's inputs, before the first token and without the batch."""
        return {
            f"{_PAST}{layer}.{name}": shape
            for layer in range(self.config.layers)
            for name, shape in graph.state_shapes(self.config, 0).items()
        }


@dataclass(frozen=True, slots=True)
class _Pass:
    """What came of one block: rows [n, d] before the head; choices and probabilities [L, B·T]."""

    rows: Tensor
    routes: Tensor
    weights: Tensor


def _turned(keys: np.ndarray, shift: int, theta: float, dim: int) -> np.ndarray:
    """Keys [..., D] as they are ``shift`` positions later: rotary, NeoX style, first ``dim``."""
    angles = shift / theta ** (np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second, rest = np.split(keys, [dim // 2, dim], axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return np.concatenate([*turned, rest], axis=-1).astype(keys.dtype)


def _present(name: str) -> str:
    """The output that a state's next input comes from."""
    return _PRESENT + name.removeprefix(_PAST)


def _routes(routers: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Each layer's choice and its probability [L, n].

    Args:
        routers: the layers' choices [n, 1], then their probabilities of all classes [n, E + 1].
    """
    layers = len(routers) // 2
    choices, probabilities = (
        torch.from_numpy(np.stack(part)) for part in (routers[:layers], routers[layers:])
    )
    return choices.squeeze(2).int(), probabilities.gather(2, choices).squeeze(2)


def _onnxruntime() -> ModuleType:
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "running ONNX graphs needs onnxruntime: pip install 'zaya-convert[onnx]' "
            "(the reference runtime does without)"
        ) from None
    return onnxruntime


def _session(runtime: ModuleType, model: onnx.ModelProto, folder: str, mapped: bool) -> Any:
    """A session on the external data in ``folder``, on as many threads as torch uses.

    Args:
        mapped: leave weights in the file.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(read.EXTERNAL_FOLDER, folder)
    options.add_session_config_entry(_UNCOPIED_KEY, str(int(mapped)))
    providers = ["CPUExecutionProvider"]
    with _named_errors():
        return runtime.InferenceSession(model.SerializeToString(), options, providers=providers)


@contextmanager
def _named_errors() -> Iterator[None]:
    """Turn onnxruntime's errors, which have no class in common, into ``InputError``."""
    try:
        yield
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise InputError(f"onnxruntime cannot run the graph: {message}") from None


def _cut(
    model: onnx.ModelProto, states: Collection[str]
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The graph up to the rows that enter the head, and the head, a single node.

    The first gives these rows, the states, and of every layer's router the choice [n, 1] and the
    probabilities [n, E + 1], in this order.

    Args:
        states: names of the inputs that are states.

    Raises:
        InputError: the graph is not built as ``export.onnx.graph`` builds it.
    """
    nodes = model.graph.node
    makers = {output: node for node in nodes for output in node.output}
    shaping = makers.get("logits")
    head = _before(shaping, makers)
    choices = [node.output[0] for node in nodes if node.op_type == "ArgMax"]
    probabilities = [node.output[0] for node in nodes if node.op_type == "Softmax"]
    known = {value.name for value in model.graph.output} == {"logits", *map(_present, states)}
    known &= len(choices) == len(probabilities) == len(states) // len(graph.STATES)
    if shaping is None or head is None or _before(head, makers) is None or not known:
        raise InputError("is built in another way than this version knows", "model.onnx")
    rows = _value(head.input[0], TensorProto.FLOAT)
    outputs = [
        rows,
        *(value for value in model.graph.output if value.name.startswith(_PRESENT)),
        *(_value(name, TensorProto.INT64) for name in choices),
        *(_value(name, TensorProto.FLOAT) for name in probabilities),
    ]
    before = [node for node in nodes if node.name not in (head.name, shaping.name)]
    return (
        _part(model, before, model.graph.input, outputs),
        _part(model, [head], [rows], [_value(head.output[0], TensorProto.FLOAT)]),
    )


def _before(
    node: onnx.NodeProto | None, makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The node that makes a node's first input."""
    return makers.get(node.input[0]) if node and node.input else None


def _part(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A model of some nodes and the weights they use."""
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    return helper.make_model(
        helper.make_graph(nodes, model.graph.name, list(inputs), outputs, weights),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def _value(name: str, dtype: int) -> onnx.ValueInfoProto:
    """Of any shape."""
    return helper.make_tensor_value_info(name, dtype, None)
