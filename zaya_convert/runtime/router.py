"""The router: a small MLP over E + 1 classes whose input also carries the previous layer's.

Class E is the *skip expert*: no expert runs and the MoE output is exactly 0 (transformers'
reading; Zyphra's vLLM gives ``h · p`` instead, llama.cpp's port never chooses it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_convert.runtime.attention import Linear, project
from zaya_convert.runtime.weights import Parts

_GATE = "mlp.gate."
_MLP = _GATE + "router_mlp."


@dataclass(frozen=True, slots=True)
class Routing:
    """Choices for n rows.

    Attributes:
        choice: [n] classes, E = skip.
        weight: [n] probability of the chosen class, neither biased nor renormalised.
        state: [n, R] what the next layer's router adds.
    """

    choice: Tensor
    weight: Tensor
    state: Tensor


def route(h: Tensor, parts: Parts, before: Tensor | None, eps: float, linear: Linear) -> Routing:
    """Choose a class for each row.

    The state is the down projection plus, after layer 0, ``router_states_scale`` times the state of
    the *layer* before (EDA), taken before the norm. ``choice = argmax(p + balancing_biases)``: the
    biases shift the choice, never the weight.

    Args:
        h: normalised hidden states [n, d].
        parts: the layer's tensors.
        before: the state of the layer before [n, R], None in layer 0.
        eps: of the norm.
        linear: the kernel of projections.
    """
    state = project(h, parts, _GATE + "down_proj", linear)
    if before is not None:
        state = state + before * parts[_GATE + "router_states_scale"]
    x = rms_norm(state, parts[_MLP + "norm.weight"], eps)
    x = F.gelu(project(x, parts, _MLP + "fc1", linear))  # the exact erf form, not tanh
    x = F.gelu(project(x, parts, _MLP + "fc2", linear))
    probabilities = torch.softmax(project(x, parts, _MLP + "out_proj", linear), dim=-1)
    choice = (probabilities.float() + parts[_GATE + "balancing_biases"]).argmax(-1)
    return Routing(choice, probabilities.gather(-1, choice[:, None])[:, 0], state)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)``: computed in fp32, scaled in the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
