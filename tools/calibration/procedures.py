"""Procedures carried out by hand: ciphers, words, sorting, programs, tables, grids, jugs.

See `puzzles` for the facts that go with every exchange.
"""

from __future__ import annotations

import random

from tools.calibration.voice import Exchange, Voice, listing

_WORDS = (
    "harbour", "lantern", "meadow", "whistle", "copper", "thunder", "velvet", "orchard", "saddle",
    "marble", "pepper", "glacier", "violin", "compass", "blanket", "cinnamon", "feather", "window",
    "bicycle", "umbrella", "library", "mountain", "telescope", "strawberry", "carpenter", "balloon",
)  # fmt: skip


def caesar(rng: random.Random) -> Exchange:
    """A shifted word, letter by letter."""
    v = Voice(rng)
    word, shift = rng.choice(_WORDS), rng.choice([n for n in range(-9, 10) if abs(n) > 1])
    letters = "abcdefghijklmnopqrstuvwxyz"
    coded = "".join(letters[(letters.index(c) + shift) % 26] for c in word)
    way = f"{abs(shift)} places {'forward' if shift > 0 else 'back'}"
    steps = [f"I number the letters a = 0 to z = 25 and move each one {way}."]
    for old, new in zip(word, coded, strict=True):
        n = letters.index(old) + shift
        wrap = "" if 0 <= n < 26 else f", outside 0 to 25, so {n % 26} instead"
        steps.append(f"'{old}' is {letters.index(old)}; moved it is {n}{wrap}: '{new}'.")
    steps.append(f"The letters in order spell '{coded}'.")
    check = [
        f"Moving '{coded[0]}' and '{coded[-1]}' back gives '{word[0]}' and '{word[-1]}'.",
        f"Both words have {len(word)} letters.",
    ]
    question = f'Encode the word "{word}" by moving every letter {way} in the alphabet (cyclic).'
    facts = {"word": word, "shift": shift}
    return v.tell("caesar", question, steps, check, coded, "The code word is {}.", facts)


def word_surgery(rng: random.Random) -> Exchange:
    """Count, filter, reverse and join words."""
    v = Voice(rng)
    words = rng.sample(_WORDS, 7)
    letter = rng.choice("aeiorlt")
    kept = [w for w in words if letter in w]
    if not kept:
        return word_surgery(rng)
    steps = ["I go through the list and look at each word."]
    for w in words:
        n = w.count(letter)
        times = "once" if n == 1 else f"{n} times"
        spelled = "-".join(w)
        steps.append(
            f"{spelled}: '{letter}' occurs {times}, keep it." if n else f"{spelled}: no '{letter}'."
        )
    turned = [w[::-1] for w in kept]
    steps += [
        f"That keeps {listing(kept)}.",
        f"Reversed: {', '.join(turned)}.",
        f"In alphabetical order: {', '.join(sorted(turned))}.",
    ]
    check = [f"{n[::-1]} backwards is {n}." for n in sorted(turned)]
    question = (
        f"From the words {', '.join(words)}, keep those that contain the letter '{letter}', "
        f"reverse "
        f"each of them, and sort the results alphabetically."
    )
    facts = {"words": words, "letter": letter}
    answer = ", ".join(sorted(turned))
    return v.tell("word_surgery", question, steps, check, answer, "The result: {}.", facts)


def sorting(rng: random.Random) -> Exchange:
    """Insertion sort by hand, with the number of shifts."""
    v = Voice(rng)
    numbers = rng.sample(range(10, 99), rng.randint(6, 8))
    row, shifts = list(numbers), 0
    steps = [f"The list is {row}. The first element alone is sorted."]
    for i in range(1, len(row)):
        item, j = row[i], i
        while j and row[j - 1] > item:
            row[j] = row[j - 1]
            j -= 1
        row[j] = item
        shifts += i - j
        moved = f"moves past {i - j} larger" if i - j else "stays where it is"
        steps.append(f"{item} {moved}: {row}. Shifts so far: {shifts}.")
    pairs = [
        sum(1 for later in numbers[i + 1 :] if later < first) for i, first in enumerate(numbers)
    ]
    check = [
        "The number of shifts is the number of pairs in the wrong order. Counting for each element "
        f"the smaller ones behind it: {' + '.join(map(str, pairs))} = {shifts}."
    ]
    question = (
        f"Sort {numbers} in ascending order by insertion sort. How many shifts of one place does "
        f"that take?"
    )
    facts = {"numbers": numbers}
    sentence = f"The sorted list is {row}, after {{}} shifts."
    return v.tell("sorting", question, steps, check, str(shifts), sentence, facts)


def code_trace(rng: random.Random) -> Exchange:
    """What a small loop prints."""
    v = Voice(rng)
    modulus, start, factor = rng.randint(3, 5), rng.randint(0, 9), rng.randint(2, 4)
    values = [rng.randint(1, 30) for _ in range(rng.randint(6, 8))]
    hit = rng.randrange(modulus)
    op = rng.choice(("total = total + n", f"total = total + {factor} * n", "total = total - n"))
    code = (
        f"total = {start}\ncount = 0\nfor n in {values}:\n    if n % {modulus} == {hit}:\n"
        f"        {op}\n    else:\n        count += 1\nprint(total, count)"
    )
    total, count = start, 0
    steps = [f"At the start total is {start} and count is 0. I trace the loop."]
    for n in values:
        if n % modulus == hit:
            old, total = total, eval(op.split("= ")[1], {"total": total, "n": n})
            put = op.split("= ")[1].replace("total", str(old)).replace("n", str(n))
            steps.append(f"n = {n}: {n} % {modulus} is {hit}, so total becomes {put} = {total}.")
        else:
            count += 1
            steps.append(
                f"n = {n}: {n} % {modulus} is {n % modulus}, not {hit}, so count becomes {count}."
            )
    steps.append(f"After the loop total is {total} and count is {count}.")
    hits = [n for n in values if n % modulus == hit]
    check = [
        f"The matching values are {hits}; {len(values)} - {len(hits)} = {count} others were "
        f"counted."
    ]
    question = f"What does this Python program print?\n\n```python\n{code}\n```\n"
    facts = {"code": code}
    answer = f"{total} {count}"
    return v.tell("code_trace", question, steps, check, answer, "It prints {}.", facts)


def cups(rng: random.Random) -> Exchange:
    """Where things are after several swaps."""
    v = Voice(rng)
    boxes = ["red", "blue", "green", "white"]
    things = rng.sample(("a coin", "a key", "a ring", "a stamp", "a button", "a shell"), 4)
    state = dict(zip(boxes, things, strict=True))
    moves, steps = [], ["I keep a table of what is in which box."]
    show = lambda: ", ".join(f"{b}: {t}" for b, t in state.items())  # noqa: E731
    steps.append(f"Start: {show()}.")
    for _ in range(rng.randint(4, 6)):
        a, b = rng.sample(boxes, 2)
        moves.append([a, b])
        state[a], state[b] = state[b], state[a]
        steps.append(f"The contents of {a} and {b} change places: {show()}.")
    asked = rng.choice(things)
    place = next(b for b, t in state.items() if t == asked)
    steps.append(f"So {asked.replace('a ', 'the ')} is in the {place} box.")
    at = boxes[things.index(asked)]
    trail = [at]
    for a, b in moves:
        at = b if at == a else a if at == b else at
        trail.append(at)
    check = [f"Following only {asked.replace('a ', 'the ')}: {' -> '.join(trail)}."]
    question = (
        f"There are four boxes. At first the {boxes[0]} box holds {things[0]}, the {boxes[1]} box "
        f"{things[1]}, the {boxes[2]} box {things[2]} and the {boxes[3]} box {things[3]}. "
        + " ".join(f"Then the contents of the {a} and the {b} box are swapped." for a, b in moves)
        + f" Which box holds {asked.replace('a ', 'the ')} now?"
    )
    facts = {"boxes": boxes, "things": things, "moves": moves, "asked": asked}
    return v.tell("cups", question, steps, check, place, "It is in the {} box.", facts)


def lattice(rng: random.Random) -> Exchange:
    """Paths on a grid with blocked corners."""
    v = Voice(rng)
    width, height = rng.randint(4, 6), rng.randint(3, 5)
    cells = [(x, y) for x in range(width) for y in range(height)][1:-1]
    blocked = rng.sample(cells, 2)
    ways: dict[tuple[int, int], int] = {}
    steps = [
        "The ways to a crossing are the ways to its left neighbour plus those to the one below."
    ]
    for y in range(height):
        for x in range(width):
            before = ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)
            ways[x, y] = 0 if (x, y) in blocked else 1 if (x, y) == (0, 0) else before
        row = ", ".join(str(ways[x, y]) for x in range(width))
        steps.append(f"Row {y}: {row}.")
    top = ways[width - 1, height - 1]
    if top == 0:
        return lattice(rng)
    left, below = ways[width - 2, height - 1], ways[width - 1, height - 2]
    steps.append(f"The last entry is {left} + {below} = {top}.")
    check = [
        f"The blocked crossings {blocked[0]} and {blocked[1]} hold a 0 in the table, as they "
        f"should."
    ]
    question = (
        f"On a street grid the crossings are (x, y) with x from 0 to {width - 1} and y from 0 to "
        f"{height - 1}. You walk from (0, 0) to ({width - 1}, {height - 1}) and only ever move one "
        f"step right or up. The crossings {blocked[0]} and {blocked[1]} are closed. How many ways "
        f"are there?"
    )
    facts = {"width": width, "height": height, "blocked": [list(b) for b in blocked]}
    return v.tell("lattice", question, steps, check, str(top), "There are {} ways.", facts)


def jugs(rng: random.Random) -> Exchange:
    """Measure an amount with two jugs."""
    v = Voice(rng)
    big, small = rng.choice(((5, 3), (7, 4), (8, 5), (9, 4), (7, 3), (11, 6), (11, 4), (9, 7)))
    goal = rng.choice([n for n in range(1, big) if n != small])
    a = b = 0
    steps = [
        f"I always fill the {small}-litre jug, pour it into the {big}-litre jug, and empty the "
        f"{big}-litre jug whenever it is full. I write (large, small)."
    ]
    moves = 0
    while goal not in (a, b):
        if a == big:
            a, text = 0, f"Empty the {big}-litre jug"
        elif b == 0:
            b, text = small, f"Fill the {small}-litre jug"
        else:
            poured = min(b, big - a)
            a, b, text = a + poured, b - poured, f"Pour {poured} L into the large jug"
        moves += 1
        steps.append(f"{text}: ({a}, {b}).")
    where = "large" if a == goal else "small"
    steps.append(f"The {where} jug now holds {goal} litres, after {moves} moves.")
    check = [
        f"The amounts that can appear are multiples of {small} minus multiples of {big}. Since "
        f"{big} and {small} share no factor, every whole number of litres can be reached."
    ]
    question = (
        f"You have a {big}-litre jug, a {small}-litre jug and a tap. How can you measure exactly "
        f"{goal} litres?"
    )
    facts = {"big": big, "small": small, "goal": goal, "moves": moves}
    sentence = f"{{}} in the {where} jug, after the {moves} moves above."
    return v.tell("jugs", question, steps, check, f"{goal} litres", sentence, facts)


GENERATORS = (caesar, word_surgery, sorting, code_trace, cups, lattice, jugs)
