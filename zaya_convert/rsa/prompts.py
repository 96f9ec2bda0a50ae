"""User messages of Markovian RSA: a problem alone, with one candidate tail, or with several.

The wording is short on purpose: it is paid for in context by every candidate of every round. The
functions are pure text; the chat template around the message belongs to the checkpoint's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

ANSWER_REQUEST = "Think step by step and give the final answer in \\boxed{}."

_REFINE = "It may be wrong or incomplete: refine it, or take a new strategy."
_AGGREGATE = (
    "Aggregate the useful ideas and resolve disagreements. "
    "If all are wrong, take another strategy. Do not restate the candidates."
)


def problem_message(problem: str) -> str:
    """The first round's message: the problem and how to answer."""
    return f"{problem.strip()}\n{ANSWER_REQUEST}"


def refine_message(problem: str, tail: str) -> str:
    """The message that hands on one candidate tail, to be refined or replaced."""
    return (
        f"{problem.strip()}\n\nHere is the end of a candidate solution.\n\n"
        f"Candidate:\n{tail.strip()}\n\n{_REFINE} {ANSWER_REQUEST}"
    )


def aggregate_message(problem: str, tails: Sequence[str]) -> str:
    """The message that hands on several candidate tails, numbered from 1."""
    if not tails:
        raise ValueError("an aggregation message needs at least one candidate tail")
    candidates = "\n\n".join(f"Candidate {n}:\n{tail.strip()}" for n, tail in enumerate(tails, 1))
    return (
        f"{problem.strip()}\n\nHere are the ends of {len(tails)} candidate solutions. "
        f"Any of them may be wrong or incomplete.\n\n{candidates}\n\n{_AGGREGATE} {ANSWER_REQUEST}"
    )


def message_for(problem: str, tails: Sequence[str] = ()) -> str:
    """The message for any number of tails: none is round 0, one refines, several aggregate."""
    if not tails:
        return problem_message(problem)
    if len(tails) == 1:
        return refine_message(problem, tails[0])
    return aggregate_message(problem, tails)
