"""Reasoning about numbers as such: products, equations, fractions, divisors, counting.

See `quantities` for how the generators work.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

from tools.calibration.voice import Exchange, Voice


def long_product(rng: random.Random) -> Exchange:
    """A product by partial products, checked modulo 9."""
    v = Voice(rng)
    a, b = rng.randint(123, 989), rng.randint(23, 97)
    tens, ones = b - b % 10, b % 10
    steps = [
        f"I split {b} into {tens} + {ones}.",
        f"The tens: {a} {v.x} {tens} = {a * tens}. That is {a} {v.x} {tens // 10} = "
        f"{a * tens // 10} with a zero appended.",
        f"The ones: {a} {v.x} {ones} = {a * ones}.",
        f"Adding both parts: {a * tens} + {a * ones} = {a * b}.",
    ]
    check = [
        f"Modulo 9, {a} leaves {a % 9} and {b} leaves {b % 9}; {a % 9} {v.x} {b % 9} = "
        f"{(a % 9) * (b % 9)}, which leaves {a * b % 9}. The product {a * b} has digit sum "
        f"{sum(map(int, str(a * b)))}, which also leaves {a * b % 9}.",
        f"The size is right too: {round(a, -2)} {v.x} {round(b, -1)} = "
        f"{round(a, -2) * round(b, -1)}, close to {a * b}.",
    ]
    ask = rng.choice(("Compute {} times {} without a calculator.", "What is {} multiplied by {}?"))
    facts = {"a": a, "b": b}
    return v.tell("long_product", ask.format(a, b), steps, check, str(a * b), "It is {}.", facts)


def linear_equation(rng: random.Random) -> Exchange:
    """One unknown on both sides."""
    v = Voice(rng)
    root, a = rng.randint(-12, 15), rng.randint(5, 14)
    c = rng.randint(2, a - 1)
    b = rng.randint(1, 40)
    d = (a - c) * root + b
    letter = rng.choice("xyztn")
    tail = f"+ {d}" if d >= 0 else f"- {-d}"
    question = f"Solve for {letter}: {a}{letter} + {b} = {c}{letter} {tail}."
    steps = [
        f"Subtracting {c}{letter} from both sides gives {a - c}{letter} + {b} = {d}.",
        f"Subtracting {b} from both sides gives {a - c}{letter} = {d - b}.",
        f"Dividing by {a - c} gives {letter} = {root}.",
    ]
    check = [
        f"Left side: {a} {v.x} ({root}) + {b} = {a * root + b}.",
        f"Right side: {c} {v.x} ({root}) {tail} = {c * root + d}.",
    ]
    facts = {"a": a, "b": b, "c": c, "d": d}
    sentence = f"The solution is {letter} = {{}}."
    return v.tell("linear_equation", question, steps, check, str(root), sentence, facts)


def quadratic(rng: random.Random) -> Exchange:
    """Two integer roots, by factoring and by the formula."""
    v = Voice(rng)
    r, s = sorted(rng.sample([n for n in range(-11, 12) if n], 2))
    b, c = -(r + s), r * s
    middle = "" if not b else f" {'+' if b > 0 else '-'} {abs(b)}x"
    equation = f"x^2{middle} {'+' if c > 0 else '-'} {abs(c)} = 0"
    root = math.isqrt(b * b - 4 * c)
    steps = [
        f"I look for two numbers whose product is {c} and whose sum is {-b}.",
        f"The numbers {r} and {s} do it: ({r}) {v.x} ({s}) = {c} and ({r}) + ({s}) = {r + s}.",
        f"So the equation factors as (x - ({r}))(x - ({s})) = 0.",
        f"A product is zero only if a factor is, so x = {r} or x = {s}.",
    ]
    check = [
        f"By the formula: the discriminant is ({b})^2 - 4 {v.x} ({c}) = {b * b - 4 * c}, whose "
        f"root "
        f"is {root}.",
        f"Then x = ({-b} - {root}) / 2 = {(-b - root) // 2} or x = ({-b} + {root}) / 2 = "
        f"{(-b + root) // 2}.",
    ]
    question = f"Find all real solutions of {equation}."
    sentence = "The solutions are {}."
    return v.tell("quadratic", question, steps, check, f"{r} and {s}", sentence, {"b": b, "c": c})


def fraction_sum(rng: random.Random) -> Exchange:
    """Three fractions over a common denominator."""
    v = Voice(rng)
    bottoms = rng.sample((2, 3, 4, 5, 6, 8, 9, 10, 12), 3)
    parts = [(rng.randint(1, d - 1) if d > 2 else 1, d) for d in bottoms]
    common = math.lcm(*bottoms)
    tops = [n * common // d for n, d in parts]
    total = Fraction(sum(tops), common)
    shared = math.gcd(sum(tops), common)
    shown = " + ".join(f"{n}/{d}" for n, d in parts)
    steps = [f"The denominators are {bottoms[0]}, {bottoms[1]} and {bottoms[2]}."]
    steps += [f"Their least common multiple is {common}."]
    steps += [
        f"{n}/{d} = {t}/{common}, because {common} / {d} = {common // d}."
        for (n, d), t in zip(parts, tops, strict=True)
    ]
    steps += [
        f"The numerators add up to {tops[0]} + {tops[1]} + {tops[2]} = {sum(tops)}.",
        f"So the sum is {sum(tops)}/{common}, and dividing both by {shared} gives {total}.",
    ]
    check = [
        f"As decimals: {' + '.join(f'{n / d:.4f}' for n, d in parts)} is about {float(total):.4f}, "
        f"and {total.numerator} / {total.denominator} is about {float(total):.4f}."
    ]
    question = f"Add the fractions {shown} and give the result in lowest terms."
    facts = {"parts": [list(p) for p in parts]}
    return v.tell("fraction_sum", question, steps, check, str(total), "The sum is {}.", facts)


def bells(rng: random.Random) -> Exchange:
    """A least common multiple, by Euclid's algorithm."""
    v = Voice(rng)
    g = rng.randint(2, 9)
    a, b = (g * n for n in rng.choice(((5, 7), (4, 9), (8, 11), (7, 12), (5, 13), (9, 14))))
    thing = rng.choice(("bells", "lighthouses", "sprinklers", "metronome lamps"))
    steps, m, n = [], b, a
    while n:
        steps.append(f"{m} divided by {n} leaves the remainder {m % n}.")
        m, n = n, m % n
    meet = a * b // m
    first = "They are together again after the least common multiple of both periods, and that is "
    steps = [
        f"{first}their product over their greatest common divisor.",
        *steps,
        f"The last divisor was {m}, so gcd({a}, {b}) = {m}.",
        f"The product is {a} {v.x} {b} = {a * b}, and {a * b} / {m} = {meet}.",
    ]
    check = [
        f"{meet} / {a} = {meet // a} and {meet} / {b} = {meet // b}, both whole, and {meet // a} "
        f"and "
        f"{meet // b} share no factor, so nothing smaller works."
    ]
    question = (
        f"Two {thing} start at the same moment. One repeats every {a} seconds, the other every {b} "
        f"seconds. After how many seconds do they coincide for the first time?"
    )
    sentence = "They coincide after {} seconds."
    return v.tell("bells", question, steps, check, str(meet), sentence, {"a": a, "b": b})


def last_digit(rng: random.Random) -> Exchange:
    """A cycle of last digits."""
    v = Voice(rng)
    base, power = rng.choice((2, 3, 7, 8, 12, 13, 17, 18, 23, 27)), rng.randint(35, 400)
    cycle = [pow(base, k, 10) for k in range(1, 5)]
    spot = (power - 1) % 4
    steps = [
        f"Only the last digit of the base matters, which is {base % 10}.",
        f"The last digits of its powers are {cycle[0]}, {cycle[1]}, {cycle[2]}, {cycle[3]}, and "
        f"then {cycle[0]} again: a cycle of length 4.",
        f"{power} = 4 {v.x} {power // 4} + {power % 4}, so the exponent stands at place {spot + 1} "
        f"of the cycle.",
        f"The digit at place {spot + 1} is {cycle[spot]}.",
    ]
    halves = power // 2
    check = [
        f"{base % 10}^2 ends in {cycle[1]}, so the {power}th power ends like {cycle[1]}^{halves}"
        f"{f' times {base % 10}' if power % 2 else ''}, which ends in "
        f"{pow(cycle[1], halves, 10) * (base if power % 2 else 1) % 10}."
    ]
    question = f"What is the last digit of {base}^{power}?"
    facts = {"base": base, "power": power}
    sentence = "The last digit is {}."
    return v.tell("last_digit", question, steps, check, str(cycle[spot]), sentence, facts)


def committee(rng: random.Random) -> Exchange:
    """Choices with a condition, counted twice."""
    v = Voice(rng)
    women, men = rng.randint(3, 7), rng.randint(3, 7)
    size = rng.randint(3, 4)
    every, none = math.comb(women + men, size), math.comb(men, size)
    cases = [(k, math.comb(women, k) * math.comb(men, size - k)) for k in range(1, size + 1)]
    steps = [
        f"Without any condition there are C({women + men}, {size}) = {every} committees.",
        f"Those without a woman are chosen from the {men} men only: C({men}, {size}) = {none}.",
        f"All others have at least one woman: {every} - {none} = {every - none}.",
    ]
    check = [
        f"With exactly {k}: C({women}, {k}) {v.x} C({men}, {size - k}) = {math.comb(women, k)} "
        f"{v.x} {math.comb(men, size - k)} = {count}."
        for k, count in cases
    ]
    check.append(f"{' + '.join(str(c) for _, c in cases)} = {every - none}.")
    question = (
        f"A club has {women} women and {men} men. How many committees of {size} contain at least "
        f"one woman?"
    )
    facts = {"women": women, "men": men, "size": size}
    sentence = "There are {} such committees."
    return v.tell("committee", question, steps, check, str(every - none), sentence, facts)


def marbles(rng: random.Random) -> Exchange:
    """Two draws without putting back."""
    v = Voice(rng)
    colours = rng.sample(("red", "blue", "green", "white", "black", "yellow"), 2)
    a, b = rng.randint(3, 9), rng.randint(3, 9)
    n = a + b
    same = Fraction(a * (a - 1) + b * (b - 1), n * (n - 1))
    both, other = Fraction(a * (a - 1), n * (n - 1)), Fraction(b * (b - 1), n * (n - 1))
    steps = [
        f"There are {a} + {b} = {n} marbles, and the first one is not put back.",
        f"Both {colours[0]}: {a}/{n} {v.x} {a - 1}/{n - 1} = {both}.",
        f"Both {colours[1]}: {b}/{n} {v.x} {b - 1}/{n - 1} = {other}.",
        f"These cases exclude each other, so the probabilities add: {both} + {other} = {same}.",
    ]
    mixed = Fraction(2 * a * b, n * (n - 1))
    check = [
        f"The opposite event, one of each colour, has probability 2 {v.x} {a}/{n} {v.x} "
        f"{b}/{n - 1} "
        f"= {mixed}, and {mixed} + {same} = 1."
    ]
    question = (
        f"A bag holds {a} {colours[0]} and {b} {colours[1]} marbles. Two are drawn at random, one "
        f"after the other, without replacement. What is the probability that they have the same "
        f"colour?"
    )
    facts = {"a": a, "b": b}
    return v.tell("marbles", question, steps, check, str(same), "The probability is {}.", facts)


def number_bases(rng: random.Random) -> Exchange:
    """From decimal to binary and hexadecimal."""
    v = Voice(rng)
    number = rng.randint(150, 4000)
    steps, n = ["I divide by 2 again and again and note the remainders."], number
    while n:
        steps.append(f"{n} = 2 {v.x} {n // 2} + {n % 2}")
        n //= 2
    steps += [
        f"Read from the last remainder to the first, the binary form is {number:b}.",
        f"In groups of four from the right this is {number:_b}, so hexadecimal {number:X}.".replace(
            "_", " "
        ),
    ]
    powers = [2**k for k in range(12, -1, -1) if number >> k & 1]
    check = [f"The set bits stand for {' + '.join(map(str, powers))} = {number}."]
    question = f"Write the decimal number {number} in binary and in hexadecimal."
    answer = f"{number:b} (binary), {number:X} (hexadecimal)"
    return v.tell(
        "number_bases", question, steps, check, answer, "The result: {}.", {"number": number}
    )


GENERATORS = (
    long_product,
    linear_equation,
    quadratic,
    fraction_sum,
    bells,
    last_digit,
    committee,
    marbles,
    number_bases,
)
