"""How far a candidate is from its reference: small pure functions, float64 inside.

* SQNR = 10 log10( sum x^2 / sum (x - y)^2 ), in dB: the signal-to-quantization-noise ratio of
  Gray & Neuhoff, "Quantization", IEEE Trans. Inf. Theory 44(6), 1998.
* KL(P || Q) = sum_v p_v (log p_v - log q_v), in nats, P the reference: Kullback & Leibler, 1951;
  per token it is what ``llama-perplexity --kl-divergence`` averages.
* perplexity = exp( mean over tokens of -log p(token) ).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """+inf when equal, also for two tensors of zeros; NaN when either holds one."""
    _same_shape(reference, candidate)
    exact = reference.to(torch.float64)
    noise = float((exact - candidate.to(torch.float64)).square().sum())
    signal = float(exact.square().sum())
    return sqnr_db_from_energy(signal, noise)


def sqnr_db_from_energy(signal: float, noise: float) -> float:
    """The same from sum x^2 and sum (x - y)^2."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def kl_divergence(ref_logits: Tensor, cand_logits: Tensor) -> Tensor:
    """KL(reference || candidate) in nats of each position: logits ``[n, vocab]`` → ``[n]``.

    A logit of -inf in both is a token neither can produce and adds nothing; where only the
    candidate rules a token out, the divergence is +inf.
    """
    _same_shape(ref_logits, cand_logits)
    log_p = torch.log_softmax(ref_logits.to(torch.float64), dim=-1)
    log_q = torch.log_softmax(cand_logits.to(torch.float64), dim=-1)
    p = log_p.exp()
    terms = torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q))
    # Rounding can leave a sum of about -1e-17 where the truth is 0 or a little more.
    return terms.sum(dim=-1).clamp_min(0)


def top1_agreement(ref_logits: Tensor, cand_logits: Tensor) -> float:
    """Share of positions at which both pick the same token; the lowest index wins a tie."""
    _same_shape(ref_logits, cand_logits)
    same = ref_logits.argmax(dim=-1) == cand_logits.argmax(dim=-1)
    if same.numel() == 0:
        raise ValueError("no positions to compare")
    return float(same.to(torch.float64).mean())


def perplexity_from_nll(nll: Tensor) -> float:
    """``nll``: -log p of each token, in nats."""
    if nll.numel() == 0:
        raise ValueError("no tokens to average")
    return float(nll.to(torch.float64).mean().exp())


def _same_shape(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(
            f"shapes differ: reference {tuple(reference.shape)}, candidate {tuple(candidate.shape)}"
        )
