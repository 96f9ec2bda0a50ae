"""``rsa``: Markovian recursive self-aggregation on a prompt or a set of problems."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zaya_convert.cli import rsa_options
from zaya_convert.cli.engines import engine_option
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options, printable, table
from zaya_convert.cli.params import MODEL, prompt_text
from zaya_convert.cli.progress import stages_bar
from zaya_convert.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zaya_convert.rsa.loop import Candidate, Round
    from zaya_convert.rsa.problems import Problem
    from zaya_convert.rsa.settings import Settings

PRESETS = ("report", "deployment", "light", "apex", "markovian", "single", "single-code", "proxy",
           "tiny")  # fmt: skip


@click.command("rsa")
@click.argument("model", type=MODEL, required=False)
@click.option("--prompt", metavar="TEXT", help="One problem; - reads stdin.")
@rsa_options.problem_options
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="Named settings, which flags overrule [default: deployment; tiny for the bundled model].",
)
@rsa_options.settings_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@engine_option
@rsa_options.engine_options
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep all candidates and tails as JSON Lines, round by round.",
)
@click.option("--resume", is_flag=True, help="Go on from the rounds in that file.")
@click.option("--overwrite", is_flag=True, help="Replace that file.")
@output_options
def command(
    model: str | None,
    prompt: str | None,
    problems: Path | None,
    limit: int | None,
    preset: str | None,
    seed: int,
    engine: str | None,
    arithmetic: str | None,
    batch: int | None,
    threads: int | None,
    endpoint: str | None,
    save: Path | None,
    resume: bool,
    overwrite: bool,
    out: Output,
    **options: Any,
) -> None:
    """Solve problems with MODEL by Markovian RSA: N rollouts, then T rounds that aggregate C tails.

    A candidate's tail is the last τ tokens of its reasoning. The score is the mean correctness of
    the last round's candidates. The same seed gives the same run.
    """
    if (prompt is None) == (problems is None):
        raise UsageError("give a problem with --prompt, or a file of them with --problems")
    if (resume or overwrite) and save is None:
        raise UsageError("--resume and --overwrite are about the file of --save")
    if endpoint and model is None:
        raise UsageError("name the MODEL behind --endpoint too: tails are cut with its tokenizer")
    client = rsa_options.client(options)
    checkpoint = open_named(model, out)
    from zaya_convert.rsa import loop, records
    from zaya_convert.rsa.problems import Problem, digest_of
    from zaya_convert.rsa.settings import PRESETS as SETTINGS
    from zaya_convert.rsa.tails import TailCutter
    from zaya_convert.runtime.tokenizer import Tokenizer

    name = preset or ("tiny" if rsa_options.is_bundled(checkpoint) else "deployment")
    base = SETTINGS[name]
    if preset is None:
        base = rsa_options.fitting(base, checkpoint.config.max_positions)
    settings = rsa_options.changed(base, options)
    if prompt is not None:
        text = prompt_text(prompt)
        if not text.strip():
            raise UsageError("the prompt is empty")
        rows = [Problem("prompt", text)]
    else:
        rows = rsa_options.read_problems(problems, limit, out)
    made = rsa_options.side(
        "model", checkpoint, out, engine=engine, arithmetic_name=arithmetic, batch=batch,
        endpoint=endpoint, client=client,
    )  # fmt: skip
    rsa_options.use_threads(threads, checkpoint)
    started = time.monotonic()
    with ExitStack() as stack:
        file = None
        if save is not None:
            made = rsa_options.with_digest(made)
            head = records.header(
                settings.to_dict(), seed=seed, problems=digest_of(rows), model=made.identity
            )
            file = stack.enter_context(
                records.open_run(save, head, resume=resume, overwrite=overwrite)
            )
        update = stack.enter_context(stages_bar(out))
        counts: Counter[int] = Counter()

        def progress(number: int, tokens: int) -> None:
            counts[number] += tokens
            of = len(rows) * settings.size(number) * settings.budget
            update(f"round {number} of {settings.rounds}, tokens", counts[number], of)

        generator = made.open()
        done = [] if file is None else list(file.rounds)
        if done:
            out.note(f"{len(done)} of {settings.rounds + 1} rounds are done already")
        rounds = loop.run(
            generator, TailCutter(Tokenizer.of(checkpoint)), rows, settings, seed=seed, done=done,
            keep=file.append if file is not None else lambda found: None, progress=progress,
        )  # fmt: skip
    seconds = time.monotonic() - started
    facts = _facts(rows, rounds, settings) | {
        "engine": generator.name, "preset": name, "settings": settings.to_dict(), "seed": seed,
        "problems_digest": digest_of(rows), "seconds": seconds,
        "saved": None if save is None else str(save),
    }  # fmt: skip
    out.result(facts, _text(rows, rounds, settings, facts))
    made_now = sum(loop.new_tokens(rounds[len(done) :]))
    out.note(
        f"{made_now:,} tokens in {seconds:.1f} s ({made_now / max(seconds, 1e-9):.0f} per second)"
        + (f"; saved to {save}" if save else "")
    )


def _facts(
    problems: Sequence[Problem], rounds: Sequence[Round], settings: Settings
) -> dict[str, Any]:
    """What came out, for JSON."""
    from zaya_convert.rsa.answers import same

    answers = []
    for problem, row in zip(problems, rounds[-1], strict=True):
        chosen = _chosen(row)
        right = [same(candidate.boxed, problem.answer) for candidate in row]
        known = problem.answer is not None
        answers.append(
            {
                "id": problem.id,
                "answers": [candidate.boxed for candidate in row],
                "majority": None if chosen is None else row[chosen].boxed,
                "correct": sum(right) / len(right) if known else None,
                "majority_correct": (chosen is not None and right[chosen]) if known else None,
            }
        )
    scores = [row["correct"] for row in answers if row["correct"] is not None]
    votes = [row["majority_correct"] for row in answers if row["majority_correct"] is not None]
    mean = sum(scores) / len(scores) if scores else None
    vote = sum(votes) / len(votes) if votes else None
    per_round = [_round_facts(problems, found) for found in rounds]
    return {
        "problems": len(problems),
        "score": vote if settings.select == "majority" else mean,
        "mean_accuracy": mean,
        "majority_accuracy": vote,
        "rounds": per_round,
        "new_tokens": sum(row["new_tokens"] for row in per_round),
        "answers": answers,
    }


def _round_facts(problems: Sequence[Problem], found: Round) -> dict[str, Any]:
    import numpy as np

    from zaya_convert.rsa import statistics
    from zaya_convert.rsa.answers import same

    everyone = [candidate for row in found for candidate in row]
    known = [i for i, problem in enumerate(problems) if problem.answer is not None]
    right = np.array(
        [sum(same(c.boxed, problems[i].answer) for c in found[i]) for i in known], "f8"
    )
    counts = np.array([len(found[i]) for i in known], "f8")
    accuracy = statistics.share(right, counts) if known else None
    return {
        "round": everyone[0].round,
        "candidates": len(everyone),
        "accuracy": accuracy and accuracy.value,
        "accuracy_low": accuracy and accuracy.low,
        "accuracy_high": accuracy and accuracy.high,
        "answered": sum(c.boxed is not None for c in everyone) / len(everyone),
        "new_tokens": sum(c.answer.new_tokens for c in everyone),
        "prompt_tokens": sum(c.answer.prompt_tokens for c in everyone),
        "longest_prompt": max(c.answer.prompt_tokens for c in everyone),
        "cut_off": sum(c.answer.finished == "length" for c in everyone) / len(everyone),
    }


def _chosen(population: Sequence[Candidate]) -> int | None:
    from zaya_convert.rsa.answers import vote

    return vote([candidate.boxed for candidate in population])


def _text(
    problems: Sequence[Problem],
    rounds: Sequence[Round],
    settings: Settings,
    facts: dict[str, Any],
) -> str:
    """What came out, for people."""
    rows = [
        (
            row["round"],
            "-" if row["accuracy"] is None
            else f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
            f"{row['answered']:.0%}",
            row["new_tokens"],
            row["longest_prompt"],
            f"{row['cut_off']:.0%}",
        )
        for row in facts["rounds"]
    ]  # fmt: skip
    header = ("round", "accuracy", "answered", "new tokens", "longest prompt", "cut off")
    parts = [table(rows, header)]
    if len(problems) == 1:
        parts.append(_one(rounds[-1][0], settings))
    elif facts["score"] is not None:
        how = "majority vote" if settings.select == "majority" else "mean of the final candidates"
        parts.append(f"score: {facts['score']:.3f} ({how})")
    return "\n\n".join(parts)


def _one(population: Sequence[Candidate], settings: Settings) -> str:
    """The answers of one problem's last round, and the text of the chosen candidate."""
    counts = Counter(candidate.boxed or "(no answer)" for candidate in population)
    lines = [f"{count:>4} x {printable(answer)}" for answer, count in counts.most_common()]
    chosen = _chosen(population)
    if settings.select == "majority" and chosen is not None:
        lines += ["", printable(population[chosen].answer.text)]
    return "\n".join(lines)
