"""transformers' ``ZayaForCausalLM`` on our kernels: codes stay codes, whatever file they come from.

``load_in_transformers`` opens what any command opens, builds transformers' model around it and puts
every quantized matrix in as packed bytes (``zaya_kernels.ops``): experts through transformers' own
interface for experts, attention, embedding and head as modules. What else the model computes is
transformers' code.

Unlike ``from_pretrained``, which fills what it misses at random and overwrites the balancing bias
of the skip expert, this takes every tensor from the file or fails.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import BALANCING_BIASES, EXPERT_PARTS, TensorKey, stored
from zaya_convert.models import open_model
from zaya_convert.oracle import require
from zaya_kernels.ops import FLOATS, LAYOUTS, Experts, Form, Matrix, pack, pack_experts
from zaya_kernels.request import Request

if TYPE_CHECKING:
    from transformers import ZayaForCausalLM

NAME = "zaya"  # what transformers calls our implementation of experts


def load_in_transformers(
    model: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    fast: bool = False,
) -> ZayaForCausalLM:
    """transformers' model of a checkpoint or an artifact, its quantized matrices held packed.

    On a CPU every grid is packed. On a GPU, ggml's blocks but Q4_0, Q5_0 and Q8_0 and groups of 16
    are held as floats, as are gates and ups of one expert on two grids, and everywhere where there
    are no native kernels; a warning counts them. The model is for inference; it cannot be saved.

    Args:
        model: what every command takes as MODEL: a folder, a GGUF file, a Hub id.
        dtype: of activations and of float tensors: float32, bfloat16 or float16.
        device: where it shall run; packed matrices cannot be moved to another kind of device.
        fast: on the CPU, round activations to int8 for products with quantized weights.

    Raises:
        UsageError: transformers is not installed or does not know ZAYA; no such device.
        InputError: the model cannot be read, or lacks a tensor.
    """
    require("transformers")
    from transformers import ZayaConfig, ZayaForCausalLM

    place = torch.device(device)
    if place.type not in ("cpu", "cuda") or (
        place.type == "cuda" and not torch.cuda.is_available()
    ):
        raise UsageError(f"there is no device {str(device)!r} here for the kernels to run on")
    checkpoint = open_model(str(model))
    register()
    config = ZayaConfig.from_dict({**checkpoint.config.to_transformers(), "dtype": dtype})
    with torch.device("meta"):
        built: Any = ZayaForCausalLM._from_config(config, experts_implementation=NAME, dtype=dtype)
    loading = _Loading(checkpoint, built, Request(dtype, place.type, fast=fast), place)
    loading.run()
    built.generation_config = _generation_config(checkpoint, built.generation_config)
    built.save_pretrained = _refuse_saving
    return built.eval()


def register() -> None:
    """Make ``model.set_experts_implementation("zaya")`` known to transformers.

    On a model that ``load_in_transformers`` did not make it computes with the float experts.
    """
    require("transformers")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


class PackedLinear(nn.Module):
    """``nn.Linear`` on a packed matrix."""

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.form = tuple(matrix.form)
        self._names = _hold(self, matrix.tensors)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return torch.ops.zaya.linear(x, _held(self, self._names), self.form, self.bias)

    def extra_repr(self) -> str:
        """For people."""
        return _described(self.form)


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` on a packed matrix."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = tuple(matrix.form), dtype
        self._names = _hold(self, matrix.tensors)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] → [..., columns]."""
        return torch.ops.zaya.embedding(ids, _held(self, self._names), self.form, self.dtype)

    def extra_repr(self) -> str:
        """For people."""
        return _described(self.form)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for the experts of a layer.

    Its router gives tokens of the skip expert to expert 0 with weight 0; they go to none here.

    Args:
        module: transformers' ``ZayaExperts``.
        hidden_states: [n, d].
        top_k_index: [n, 1].
        top_k_weights: [n, 1].
    """
    shares = top_k_weights[:, 0]
    ids = top_k_index[:, 0].masked_fill(shares == 0, -1)
    banks = getattr(module, "banks", None)
    if banks is None:
        both, down = module.gate_up_proj, module.down_proj
        forms = (_float_form(both), _float_form(down))
        return torch.ops.zaya.moe_ffn(hidden_states, ids, shares, [both, down], *forms)
    outputs = [bank(hidden_states, ids, shares) for bank in banks]
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)


class ExpertBank(nn.Module):
    """Experts of a layer whose matrices are of one form: all of them, in most artifacts."""

    def __init__(self, which: Sequence[int], experts: Experts, count: int) -> None:
        super().__init__()
        self.gate_up, self.down = tuple(experts.gate_up), tuple(experts.down)
        self._names = _hold(self, experts.tensors)
        places = torch.full((count,), -1)
        places[list(which)] = torch.arange(len(which))
        self.places: Tensor | None
        self.register_buffer("places", None if len(which) == count else places)

    def forward(self, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """[n, d]; rows of no expert of this bank are 0."""
        if self.places is not None:
            ids = self.places[ids.clamp_min(0)].masked_fill(ids < 0, -1)
        tensors = _held(self, self._names)
        return torch.ops.zaya.moe_ffn(x, ids, shares, tensors, self.gate_up, self.down)

    def extra_repr(self) -> str:
        """For people."""
        return f"gate and up {_described(self.gate_up)}; down {_described(self.down)}"


class _Loading:
    """Fills transformers' empty model."""

    def __init__(
        self, checkpoint: Checkpoint, model: Any, request: Request, device: torch.device
    ) -> None:
        self._checkpoint, self._model = checkpoint, model
        self._request, self._device = request, device
        self._as_floats: Counter[str] = Counter()

    def run(self) -> None:
        config = self._checkpoint.config
        for layer, module in enumerate(self._model.model.layers):
            self._load_experts(layer, module.mlp.experts)
        for key in self._checkpoint.infos:
            if key.expert < 0:
                self._load(key, stored("hybrid", key, config.dims, config.layers).name)
        if config.tied and not isinstance(self._model.lm_head, PackedLinear):
            self._model.lm_head.weight = self._model.model.embed_tokens.weight
        rotary = self._model.model.rotary_emb
        self._model.model.rotary_emb = type(rotary)(rotary.config).to(self._device)
        named = (*self._model.named_parameters(), *self._model.named_buffers())
        if left := [name for name, tensor in named if tensor.is_meta]:
            where = self._checkpoint.path.name
            raise InputError([f"{name} is not filled" for name in sorted(left)], where)
        if self._as_floats:
            found = ", ".join(f"{count} of {label}" for label, count in self._as_floats.items())
            dtype = str(self._request.dtype).removeprefix("torch.")
            warnings.warn(
                f"matrices held as {dtype}, which no kernel takes as they are: {found}",
                stacklevel=3,
            )

    def _load(self, key: TensorKey, name: str) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if self._checkpoint.infos[key].spec is None:
            dtype = torch.float32 if key.part == BALANCING_BIASES else self._request.dtype
            value = self._checkpoint.read_float(key, dtype).to(self._device)
            _set(module, attribute, value)
            return
        matrix = self._pack(key)
        if isinstance(module, nn.Embedding):
            self._model.model.embed_tokens = PackedEmbedding(matrix, self._request.dtype)
            if not self._checkpoint.config.tied:
                return
            owner, module = "lm_head", self._model.lm_head
        above, _, last = owner.rpartition(".")
        setattr(self._model.get_submodule(above), last, PackedLinear(matrix, module.bias))

    def _pack(self, key: TensorKey) -> Matrix:
        matrix = pack(self._checkpoint.read(key), self._request)
        self._note(key, matrix.form)
        return Matrix([tensor.to(self._device) for tensor in matrix.tensors], matrix.form)

    def _load_experts(self, layer: int, module: Any) -> None:
        count = self._checkpoint.config.experts
        keys = [
            [TensorKey(layer, part, expert) for part in EXPERT_PARTS] for expert in range(count)
        ]
        banks = pack_experts(
            [[self._checkpoint.read(k) for k in own] for own in keys], self._request
        )
        for which, experts in banks:
            for expert in which:
                forms = (experts.gate_up, experts.gate_up, experts.down)
                for key, form in zip(keys[expert], forms, strict=True):
                    self._note(key, form)
        del module.gate_up_proj, module.down_proj
        made = [ExpertBank(which, experts, count) for which, experts in banks]
        module.banks = nn.ModuleList(made).to(self._device)

    def _note(self, key: TensorKey, form: Form) -> None:
        spec = self._checkpoint.infos[key].spec
        if spec is not None and form.held_as == FLOATS:
            self._as_floats[spec.label] += 1


def _hold(module: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    """Register tensors as buffers, which move with their module; returns their names."""
    names = [f"packed_{index}" for index in range(len(tensors))]
    for own, tensor in zip(names, tensors, strict=True):
        module.register_buffer(own, tensor)
    return names


def _held(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    return [getattr(module, name) for name in names]


def _set(module: nn.Module, attribute: str, value: Tensor) -> None:
    is_buffer = attribute in dict(module.named_buffers(recurse=False))
    setattr(module, attribute, value if is_buffer else nn.Parameter(value, requires_grad=False))


def _float_form(bank: Tensor) -> Form:
    return Form(LAYOUTS.index(FLOATS), *bank.shape[1:])


def _described(form: Sequence[int]) -> str:
    means = Form(*form)
    grid = "floats" if means.spec is None else f"{means.spec.label}, {means.held_as}"
    return f"{means.rows} × {means.columns}, {grid}"


def _generation_config(checkpoint: Checkpoint, default: Any) -> Any:
    from transformers import GenerationConfig

    raw = checkpoint.side_files().get("generation_config.json")
    return default if raw is None else GenerationConfig.from_dict(json.loads(raw))


def _refuse_saving(*args: object, **options: object) -> None:
    raise UsageError("a model on packed weights is not saved again: keep the artifact it came from")
