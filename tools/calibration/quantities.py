"""Reasoning about quantities: arithmetic, algebra, units, rates, counting, chance.

Every generator draws numbers so that the answer is exact, writes the steps with the values it
computed, and returns the drawn numbers as facts.
"""

from __future__ import annotations

import random
from fractions import Fraction

from tools.calibration.voice import Exchange, Voice, money

_GOODS = (
    "notebooks", "lamps", "mugs", "ropes", "brushes", "candles", "scarves", "baskets", "batteries",
    "envelopes", "jars of honey", "paint tins", "packets of seeds", "tea towels",
)  # fmt: skip


def shopping(rng: random.Random) -> Exchange:
    """A bill of several items, a discount, and the change."""
    v = Voice(rng)
    (who,) = v.names(1)
    lines = [(g, rng.randint(2, 9), 20 * rng.randint(4, 48)) for g in rng.sample(_GOODS, 3)]
    percent = rng.choice((5, 10, 20, 25))
    subtotal = sum(n * cents for _, n, cents in lines)
    off = subtotal * percent // 100
    paid = (subtotal - off + 1999) // 1000 * 1000
    bought = "; ".join(f"{n} {g} at {money(c)} each" for g, n, c in lines)
    question = (
        f"{who} buys the following: {bought}. The shop takes {percent}% off the whole bill, and "
        f"{who} pays with {money(paid)}. How much change is due?"
    )
    steps = [f"{g.capitalize()}: {n} {v.x} {money(c)} = {money(n * c)}." for g, n, c in lines]
    amounts = " + ".join(money(n * c) for _, n, c in lines)
    steps += [
        f"The subtotal is {amounts} = {money(subtotal)}.",
        f"The discount of {percent}% is {money(off)}, which leaves {money(subtotal - off)}.",
        f"The change is {money(paid)} - {money(subtotal - off)} = {money(paid - subtotal + off)}.",
    ]
    check = [
        f"Adding back: {money(paid - subtotal + off)} + {money(subtotal - off)} = {money(paid)}, "
        f"and the discount together with the price paid gives {money(off)} + "
        f"{money(subtotal - off)} = {money(subtotal)}."
    ]
    facts = {"lines": [[n, c] for _, n, c in lines], "percent": percent, "paid": paid}
    answer = money(paid - subtotal + off)
    return v.tell("shopping", question, steps, check, answer, f"{who} gets {{}} back.", facts)


def two_unknowns(rng: random.Random) -> Exchange:
    """Heads and prices: two linear equations."""
    v = Voice(rng)
    kinds = rng.choice((("adult", "child"), ("balcony", "stalls"), ("day", "season")))
    p, q = rng.randint(9, 19), rng.randint(3, 8)
    first, second = rng.randint(12, 80), rng.randint(12, 80)
    total, income = first + second, first * p + second * q
    question = (
        f"A theatre sold {total} tickets for ${income}. A ticket of kind '{kinds[0]}' costs ${p}, "
        f"one of kind '{kinds[1]}' ${q}. How many '{kinds[0]}' tickets were sold?"
    )
    steps = [
        f"Let a be the number of '{kinds[0]}' tickets and c the number of '{kinds[1]}' tickets.",
        f"Then a + c = {total} and {p}a + {q}c = {income}.",
        f"From the first equation c = {total} - a. Put into the second: {p}a + {q}({total} - a) = "
        f"{income}, so {p - q}a + {q * total} = {income}.",
        f"Hence {p - q}a = {income - q * total} and a = {income - q * total} / {p - q} = {first}.",
    ]
    check = [
        f"If every ticket cost ${q}, the income would be {total} {v.x} {q} = {total * q}. The "
        f"missing {income - q * total} comes from tickets that cost {p - q} more, which makes "
        f"{first} of them.",
        f"And {first} {v.x} {p} + {second} {v.x} {q} = {income}.",
    ]
    facts = {"total": total, "income": income, "p": p, "q": q}
    sentence = f"{{}} tickets of kind '{kinds[0]}' were sold."
    return v.tell("two_unknowns", question, steps, check, str(first), sentence, facts)


def speeds(rng: random.Random) -> Exchange:
    """Units of speed, and a duration from a distance."""
    v = Voice(rng)
    mps = rng.randint(4, 30)
    minutes = rng.choice((5, 10, 15, 20, 25, 40))
    metres = mps * 60 * minutes
    kmh = Fraction(mps * 18, 5)
    shown = f"{float(kmh):g}"
    thing = rng.choice(("A tram", "A cyclist", "A freight train", "A boat", "A drone", "A van"))
    question = (
        f"{thing} moves at a steady {shown} km/h. How many minutes does it need for "
        f"{metres / 1000:g} km? Also state the speed in metres per second."
    )
    steps = [
        f"One kilometre is 1000 m and one hour is 3600 s, so {shown} km/h are {shown} {v.x} "
        f"1000 / 3600 m/s. That is {shown} / 3.6 = {mps} m/s.",
        f"The distance of {metres / 1000:g} km is {metres} m.",
        f"The time is {metres} / {mps} = {metres // mps} seconds.",
        f"In minutes: {metres // mps} / 60 = {minutes}.",
    ]
    check = [
        f"In one minute it covers {mps} {v.x} 60 = {mps * 60} m; in {minutes} minutes that makes "
        f"{mps * 60} {v.x} {minutes} = {metres} m."
    ]
    facts = {"kmh": shown, "km": f"{metres / 1000:g}"}
    sentence = f"It needs {{}} minutes, at {mps} m/s."
    return v.tell("speeds", question, steps, check, str(minutes), sentence, facts)


def meeting(rng: random.Random) -> Exchange:
    """Two that travel towards each other."""
    v = Voice(rng)
    one, two = v.names(2)
    a, b = rng.sample(range(8, 34, 2), 2)
    hours, head = rng.randint(2, 6), rng.randint(1, 2)
    distance = (a + b) * hours + a * head
    start = rng.randint(6, 10)
    question = (
        f"Two villages are {distance} km apart. {one} leaves the first at {start}:00 and rides at "
        f"{a} km/h towards the second. {two} leaves the second at {start + head}:00 and rides at "
        f"{b} km/h towards the first. At what time do they meet?"
    )
    left = distance - a * head
    end = start + head + hours
    steps = [
        f"{one} rides alone for {head} h and covers {a} {v.x} {head} = {a * head} km.",
        f"That leaves {distance} - {a * head} = {left} km between them at {start + head}:00.",
        f"From then on the gap closes at {a} + {b} = {a + b} km/h.",
        f"The gap is gone after {left} / {a + b} = {hours} h, which is at {end}:00.",
    ]
    check = [
        f"{one} has ridden {head + hours} h: {a} {v.x} {head + hours} = {a * (head + hours)} km.",
        f"{two} has ridden {hours} h: {b} {v.x} {hours} = {b * hours} km.",
        f"Together {a * (head + hours)} + {b * hours} = {distance} km, the whole way.",
    ]
    facts = {"distance": distance, "a": a, "b": b, "start": start, "head": head}
    return v.tell("meeting", question, steps, check, f"{end}:00", "They meet at {}.", facts)


def shared_work(rng: random.Random) -> Exchange:
    """Rates of work that add up."""
    v = Voice(rng)
    a, b = rng.choice(((3, 6), (4, 12), (6, 12), (10, 15), (12, 24), (20, 30), (6, 30), (8, 24)))
    together = a * b // (a + b)
    one, two = rng.choice((("pump A", "pump B"), ("the old press", "the new press")))
    question = (
        f"Working alone, {one} finishes a job in {a} hours and {two} in {b} hours. How many hours "
        f"do they need together if neither slows the other down?"
    )
    steps = [
        f"In one hour {one} does 1/{a} of the job and {two} does 1/{b}.",
        f"Together they do 1/{a} + 1/{b} = {Fraction(a + b, a * b)} of the job per hour.",
        f"One whole job therefore takes {together} hours.",
    ]
    check = [
        f"In {together} hours {one} does {Fraction(together, a)} and {two} does "
        f"{Fraction(together, b)}; {Fraction(together, a)} + {Fraction(together, b)} = 1.",
        f"It is also plausible that {together} is less than {min(a, b)}: help cannot make it "
        f"slower. "
        f"And it is more than {min(a, b)} / 2 = {min(a, b) / 2:g}, because the helper is slower.",
    ]
    return v.tell(
        "shared_work",
        question,
        steps,
        check,
        str(together),
        "They need {} hours.",
        {"a": a, "b": b},
    )


def percent_chain(rng: random.Random) -> Exchange:
    """A rise and a fall do not cancel."""
    v = Voice(rng)
    start = 1000 * rng.randint(2, 40)
    up, down = rng.choice((10, 20, 25, 30, 40, 50)), rng.choice((10, 20, 25, 30, 40))
    high = start * (100 + up) // 100
    final = high * (100 - down) // 100
    what = rng.choice(("population of a town", "number of visitors", "stock of a warehouse"))
    question = (
        f"The {what} was {start}. It rose by {up}% in the first year and fell by {down}% in the "
        f"second. What is it now, and is that more or less than at the start?"
    )
    word = "more" if final > start else "less" if final < start else "the same"
    steps = [
        f"A rise of {up}% of {start} is {start * up // 100}, so after one year it is {start} + "
        f"{start * up // 100} = {high}.",
        f"The fall is {down}% of the new value, not of the old one: {high * down // 100}.",
        f"After two years it is {high} - {high * down // 100} = {final}.",
        f"Compared with {start}, that is {word}.",
    ]
    check = [
        f"With factors: {start} {v.x} {1 + up / 100:g} {v.x} {1 - down / 100:g} = {final}.",
        f"Just adding the percentages ({up} - {down} = {up - down}) would be wrong, since they "
        "refer to different bases.",
    ]
    facts = {"start": start, "up": up, "down": down}
    sentence = f"It is now {{}}, {word} compared with the start."
    return v.tell("percent_chain", question, steps, check, str(final), sentence, facts)


def averages(rng: random.Random) -> Exchange:
    """A missing value from a mean, then the median."""
    v = Voice(rng)
    values = [rng.randint(11, 60) for _ in range(7)]
    values[-1] += -sum(values) % 7
    mean = sum(values) // 7
    known, missing = values[:-1], values[-1]
    ordered = sorted(values)
    shown = ", ".join(map(str, known))
    steps = [
        f"Seven values with mean {mean} have the sum 7 {v.x} {mean} = {7 * mean}.",
        f"The six known values add up to {' + '.join(map(str, known))} = {sum(known)}.",
        f"So the missing one is {7 * mean} - {sum(known)} = {missing}.",
        f"In order the values are {', '.join(map(str, ordered))}.",
        f"The fourth of seven is the median: {ordered[3]}.",
    ]
    deviations = [n - mean for n in values]
    check = [
        f"The deviations from {mean} are {', '.join(f'{d:+d}' for d in deviations)}; they add up "
        f"to {sum(deviations)}, as they must.",
        "Three values stand before the median and three after it.",
    ]
    question = (
        f"Seven measurements have a mean of {mean}. Six of them are {shown}. What is the median of "
        f"all seven?"
    )
    facts = {"known": known, "mean": mean}
    return v.tell("averages", question, steps, check, str(ordered[3]), "The median is {}.", facts)


def garden_path(rng: random.Random) -> Exchange:
    """The area of a frame around a rectangle."""
    v = Voice(rng)
    length, width, path = rng.randint(9, 30), rng.randint(5, 18), rng.randint(1, 3)
    outer = (length + 2 * path) * (width + 2 * path)
    area = outer - length * width
    price = rng.randint(12, 45)
    steps = [
        f"With the path the rectangle measures {length} + 2 {v.x} {path} = {length + 2 * path} m "
        f"by "
        f"{width} + 2 {v.x} {path} = {width + 2 * path} m.",
        f"The outer area is {length + 2 * path} {v.x} {width + 2 * path} = {outer} square metres.",
        f"The garden alone has {length} {v.x} {width} = {length * width} square metres.",
        f"The path has {outer} - {length * width} = {area} square metres.",
        f"Its price is {area} {v.x} {price} = {area * price} dollars.",
    ]
    sides, corners = 2 * path * (length + width), 4 * path * path
    check = [
        f"Cut the path into four strips along the sides and four corner squares: 2 {v.x} {path} "
        f"{v.x} {length + width} = {sides} and 4 {v.x} {path} {v.x} {path} = {corners}.",
        f"{sides} + {corners} = {area}.",
    ]
    question = (
        f"A rectangular garden of {length} m by {width} m is surrounded by a path that is {path} m "
        f"wide on all sides. Paving costs ${price} per square metre. What does the path cost?"
    )
    facts = {"length": length, "width": width, "path": path, "price": price}
    sentence = "Paving the path costs {} dollars."
    return v.tell("garden_path", question, steps, check, str(area * price), sentence, facts)


def ages(rng: random.Random) -> Exchange:
    """A riddle about ages now and then."""
    v = Voice(rng)
    old, young = v.names(2)
    later, k, now = rng.randint(3, 12), rng.randint(2, 3), rng.randint(4, 15)
    gap = (k - 1) * (now + later)
    question = (
        f"{old} is {gap} years older than {young}. In {later} years {old} will be {k} times as old "
        f"as {young} will be then. How old are they now?"
    )
    steps = [
        f"Let y be {young}'s age now; then {old} is y + {gap}.",
        f"In {later} years the ages are y + {later} and y + {gap + later}.",
        f"The condition says y + {gap + later} = {k}(y + {later}) = {k}y + {k * later}.",
        f"So {k - 1}y = {gap + later} - {k * later}, which is {gap + later - k * later}, and y = "
        f"{now}.",
        f"{old} is {now} + {gap} = {now + gap}.",
    ]
    check = [
        f"In {later} years: {now} + {later} = {now + later} and {now + gap} + {later} = "
        f"{now + gap + later}.",
        f"{k} {v.x} {now + later} = {now + gap + later}.",
    ]
    answer = f"{young} is {now} and {old} is {now + gap}"
    facts = {"gap": gap, "later": later, "k": k, "young": young, "old": old}
    return v.tell("ages", question, steps, check, answer, "{}.", facts)


def mixture(rng: random.Random) -> Exchange:
    """Two concentrations give a third."""
    v = Voice(rng)
    weak, strong = rng.choice((5, 10, 15, 20)), rng.choice((40, 50, 60, 80))
    a, b = rng.randint(2, 12) * 10, rng.randint(2, 12) * 10
    salt = a * weak + b * strong
    share = Fraction(salt, a + b)
    shown = f"{float(share):.1f}"
    steps = [
        f"The first solution brings {a} {v.x} {weak} / 100 = {a * weak / 100:g} g of salt.",
        f"The second brings {b} {v.x} {strong} / 100 = {b * strong / 100:g} g.",
        f"Together that is {a * weak / 100:g} + {b * strong / 100:g} = {salt / 100:g} g of salt in "
        f"{a} + {b} = {a + b} g of solution.",
        f"The share is {salt / 100:g} / {a + b}, which is about {shown} percent after rounding.",
    ]
    check = [
        f"The result must lie between {weak}% and {strong}%, and nearer to that of which there is "
        f"more. {shown}% does lie between them.",
        f"Water balance: {a * (100 - weak) / 100:g} + {b * (100 - strong) / 100:g} = "
        f"{(a + b) - salt / 100:g} g of water, and {(a + b) - salt / 100:g} + {salt / 100:g} = "
        f"{a + b}.",
    ]
    question = (
        f"{a} g of a {weak}% salt solution are mixed with {b} g of a {strong}% salt solution. What "
        f"is the concentration of the mixture, to one decimal place?"
    )
    facts = {"a": a, "b": b, "weak": weak, "strong": strong}
    sentence = "The mixture has {}."
    return v.tell("mixture", question, steps, check, f"{shown}%", sentence, facts)


GENERATORS = (
    shopping,
    two_unknowns,
    speeds,
    meeting,
    shared_work,
    percent_chain,
    averages,
    garden_path,
    ages,
    mixture,
)
