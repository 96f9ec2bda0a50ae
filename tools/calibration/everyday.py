"""Reasoning in everyday language: common sense, kinds of things, and other tongues than English."""

from __future__ import annotations

import random
from itertools import pairwise

from tools.calibration.voice import Exchange, Voice, listing

_KINDS = (
    "blips", "toves", "wuzzles", "grobs", "fendels", "mirks", "plonks", "quivers", "snarps",
    "yelts", "zorps", "dabbers",
)  # fmt: skip
_TRAITS = ("glow in the dark", "sleep in winter", "eat moss", "sing at dawn", "fear water")


def syllogism(rng: random.Random) -> Exchange:
    """A chain of "all are" with one break: what follows and what does not."""
    v = Voice(rng)
    chain = rng.sample(_KINDS, 5)
    trait = rng.choice(_TRAITS)
    (who,) = v.names(1)
    at, asked = rng.randrange(3), rng.randrange(4)
    rules = [f"all {a} are {b}" for a, b in pairwise(chain)]
    rules.append(f"all {chain[3]} {trait}")
    order = rng.sample(range(len(rules)), len(rules))
    follows = asked >= at
    claim = f"{who} is one of the {chain[asked]}"
    steps = [f"I start from what is known: {who} is one of the {chain[at]}."]
    for n in range(at, 4):
        steps.append(f"Since {rules[n]}, {who} is also one of the {chain[n + 1]}.")
    steps.append(f"The {chain[3]} all {trait}, so {who} does too, whatever else may hold.")
    if follows:
        steps.append(f"The claim that {claim} is on this chain, so it follows.")
    else:
        steps.append(
            f"The claim that {claim} would need the rule read backwards: from {chain[asked + 1]} "
            f"to "
            f"{chain[asked]}. A rule 'all A are B' says nothing about a B being an A."
        )
    check = [
        f"Imagine a world with a single creature {who} that belongs exactly to "
        f"{listing(chain[at:])}. All the rules hold there, and it is "
        f"{'also' if follows else 'not'} one of the {chain[asked]}."
    ]
    text = "; ".join(rules[n] for n in order)
    question = (
        f"Suppose the following: {text}. {who} is one of the {chain[at]}. Does it follow that "
        f"{claim}? And does it follow that {who} belongs to those that {trait}?"
    )
    answer = f"{'yes' if follows else 'no'}, and yes"
    facts = {"chain": chain, "at": at, "asked": asked}
    return v.tell("syllogism", question, steps, check, answer, "The answers: {}.", facts)


# Question, steps, check, answer and its sentence; {a} and {b} are counts, {s} their sum, {d} the
# difference of {s} and {c}, {h} the half of {d}.
_TONGUES = (
    (
        "{who} hat {a} Äpfel gepflückt und bekommt von der Nachbarin noch {b} dazu. Für einen "
        "Kuchen "
        "braucht {who} {c} Äpfel. Den Rest teilt {who} gerecht mit einem Freund. Wie viele Äpfel "
        "bekommt jeder?",
        ("Zuerst zähle ich alle Äpfel zusammen: {a} + {b} = {s}.",
         "Für den Kuchen gehen {c} ab: {s} - {c} = {d}.",
         "Den Rest teilen sich zwei Personen, also {d} / 2 = {h}."),
        "Zur Probe rechne ich rückwärts: {h} + {h} = {d}, dann {d} + {c} = {s}, und das ist die "
        "Menge am Anfang.",
        "Jeder bekommt {} Äpfel.",
    ),
    (
        "Dans la bibliothèque du village, {who} range {a} livres le matin et {b} l'après-midi. Le "
        "soir, {c} de ces livres sont empruntés, et les autres sont répartis également sur deux "
        "étagères. Combien de livres y a-t-il sur chaque étagère ?",
        ("Je calcule d'abord le nombre total de livres rangés : {a} + {b} = {s}.",
         "Ensuite j'enlève les livres empruntés : {s} - {c} = {d}.",
         "Il reste à partager entre deux étagères : {d} / 2 = {h}."),
        "Vérifions dans l'autre sens : {h} + {h} = {d}, et {d} + {c} = {s}. Le compte est bon.",
        "Il y a {} livres sur chaque étagère.",
    ),
    (
        "{who} vende {a} panes por la mañana y {b} por la tarde. De ese total, {c} eran de "
        "centeno y "
        "los demás de trigo; los de trigo se hornearon en dos tandas iguales. ¿Cuántos panes tenía "
        "cada tanda?",
        ("Primero sumo todas las ventas del día: {a} + {b} = {s}.",
         "Después quito los panes de centeno: {s} - {c} = {d}.",
         "Como hubo dos tandas iguales, divido entre dos: {d} / 2 = {h}."),
        "Compruebo el resultado al revés: {h} + {h} = {d}, y {d} + {c} = {s}. Coincide.",
        "Cada tanda tenía {} panes.",
    ),
    (
        "{who} percorre {a} km in bicicletta il sabato e {b} km la domenica. Di questi, {c} km "
        "sono "
        "in salita; il resto è metà in pianura e metà in discesa. Quanti chilometri sono in "
        "discesa?",
        ("Sommo le distanze dei due giorni: {a} + {b} = {s}.",
         "Tolgo la parte in salita: {s} - {c} = {d}.",
         "La metà di ciò che resta è in discesa: {d} / 2 = {h}."),
        "Controllo all'indietro: {h} + {h} = {d} e {d} + {c} = {s}. Torna tutto.",
        "Sono in discesa {} chilometri.",
    ),
    (
        "{who} comprou {a} laranjas na feira e colheu mais {b} no quintal. Usou {c} para fazer "
        "sumo e "
        "dividiu as restantes em dois cestos iguais. Quantas laranjas ficaram em cada cesto?",
        ("Primeiro somo as laranjas: {a} + {b} = {s}.",
         "Depois tiro as que foram para o sumo: {s} - {c} = {d}.",
         "Divido o resto por dois cestos: {d} / 2 = {h}."),
        "Confirmo fazendo o caminho inverso: {h} + {h} = {d}, e {d} + {c} = {s}. Está certo.",
        "Ficaram {} laranjas em cada cesto.",
    ),
)  # fmt: skip
_THINK = {
    0: ("Ich lese die Aufgabe noch einmal und notiere die Zahlen.", "Die Rechnung stimmt also."),
    1: ("Je relis l'énoncé et je note les données.", "La réponse est donc sûre."),
    2: ("Leo otra vez el enunciado y anoto los datos.", "Por tanto, la respuesta es correcta."),
    3: ("Rileggo il testo e annoto i dati.", "Quindi la risposta è giusta."),
    4: ("Leio de novo o enunciado e anoto os dados.", "Logo, a resposta está correta."),
}


def other_tongue(rng: random.Random) -> Exchange:
    """A short word problem, reasoned about in its own language."""
    v = Voice(rng)
    (who,) = v.names(1)
    pick = rng.randrange(len(_TONGUES))
    told, steps, check, sentence = _TONGUES[pick]
    a, b, h = rng.randint(12, 70), rng.randint(12, 70), rng.randint(4, 11)
    s = a + b
    values = {"who": who, "a": a, "b": b, "c": s - 2 * h, "s": s, "d": 2 * h, "h": h}
    first, last = _THINK[pick]
    lines = [first, *steps, check, last]
    thinking = ("\n" if rng.random() < 0.5 else "\n\n").join(
        line.format(**values) for line in lines
    )
    work = " ".join(step.format(**values) for step in steps)
    final = sentence.format(f"**{h}**")
    reply = f"{work}\n\n{final}" if rng.random() < 0.6 else final
    facts = {"a": a, "b": b, "c": s - 2 * h}
    return Exchange("other_tongue", told.format(**values), thinking, reply, str(h), facts)


# Hand-written: question, steps, check, short answer.
_SENSE = (
    ("A wet towel and a dry towel of the same kind hang side by side in a freezing, windless shed. "
     "In the morning one is stiff as a board. Which one, and why?",
     ("A dry towel holds almost no water, so cold alone changes little about how it bends.",
      "A wet towel is full of liquid water between its fibres.",
      "Below the freezing point that water turns to ice, which locks the fibres together."),
     "If the dry towel were stiff, something solid would have to fill it, and nothing does.",
     "the wet towel"),
    ("Someone leaves a helium balloon, a brick and a feather on the seat of a parked convertible "
     "with "
     "an open roof, and a moderate wind blows all night. What is most likely still there?",
     ("The balloon rises by itself as soon as nothing holds it, so it leaves without any wind.",
      "The feather is light with a large surface, and even a weak gust lifts it over the door.",
      "The brick is heavy and compact; a moderate wind cannot move it."),
     "For the brick to leave, a person would have to take it, and the question mentions only wind.",
     "the brick"),
    ("I put a sealed glass bottle filled to the brim with water into the freezer overnight. What "
     "will "
     "I probably find, and what should I have done?",
     ("Water expands by roughly a tenth when it freezes.",
      "The bottle is full and sealed, so there is no room for the expansion.",
      "Glass hardly stretches and cracks under such a pressure."),
     "With some air left in the bottle the ice could push into that space, which supports the "
     "idea.",
     "a cracked bottle; some room should have been left"),
    ("A baker says that the loaf on the left came out of the oven an hour after the loaf on the "
     "right, "
     "and both were baked alike. The kitchen is cool. Which loaf is warmer now?",
     ("Both loaves had the same temperature when they left the oven.",
      "In a cool kitchen a loaf loses heat all the time.",
      "The left loaf came out later, so it has had one hour less to cool."),
     "After many hours both would be as cool as the room, but never would the older one be warmer.",
     "the left loaf, unless both are already cold"),
    ("The trophy does not fit into the brown suitcase because it is too large. What is too large? "
     "And "
     "what if the sentence ended with 'because it is too small'?",
     ("Something fits into a container if it is smaller than the space inside.",
      "With 'too large' the obstacle must be the thing that goes in, so 'it' is the trophy.",
      "With 'too small' the obstacle must be the container, so 'it' is the suitcase."),
     "Swapping the readings gives nonsense: a suitcase that is too large would hold the trophy "
     "easily.",
     "the trophy; in the second case the suitcase"),
    ("A recipe says to add the flour after the eggs and before the milk, and to grease the pan "
     "first "
     "of all. The oven has to be hot when the batter is done. Give a sensible order of all steps.",
     ("Greasing comes first, as the recipe demands.",
      "The oven needs time to heat, so it is switched on early, while the batter is being made.",
      "Then the order is eggs, flour, milk, since flour stands between the two others.",
      "Last, the batter goes into the pan and the pan into the hot oven."),
     "Each condition holds: the pan first, flour between eggs and milk, heat ready at the end.",
     "grease the pan, start the oven, eggs, flour, milk, bake"),
    ("Two lifts serve a tower. One is called and does not come; its display shows the same floor "
     "for "
     "ten minutes. People on several floors wait. What is a reasonable explanation and action?",
     ("A working lift that is called moves unless something keeps its door open or it is locked.",
      "Ten minutes on one floor is far longer than loading takes.",
      "So it is probably blocked, switched off, or broken; waiting longer will not help."),
     "If it were only busy, the display would change from time to time, and it does not.",
     "it is stuck or blocked; use the other lift or the stairs and report it"),
    ("Is it better to carry a heavy box up the stairs in one go, or to take half of the contents "
     "twice, "
     "if the stairs are long and nobody is in a hurry?",
     ("The contents need the same lifting work either way, but with two trips I also lift my own "
      "body "
      "twice.",
      "On the other hand, a box that is too heavy strains the back and makes a fall more likely.",
      "Nobody is in a hurry, so the time of a second trip costs little."),
     "With a light box the balance tips: there the second trip brings effort and no safety.",
     "two trips, if the full box is near one's limit"),
    ("A sign in a shop reads: 'Everything must go! 50% off, today only.' The same sign hung there "
     "last "
     "week and the week before. What can a careful customer conclude?",
     ("The words 'today only' would be true on a single day.",
      "The sign was there on many days, so on most of them this statement was false.",
      "The reduced price is therefore simply the usual price, and there is no reason to hurry."),
     "It could be a real sale each time, but then the shop would not have needed the word 'only'.",
     "the offer is not special, and there is no need to hurry"),
    ("A cyclist rides north along a straight road in the early evening, and the low sun shines on "
     "the "
     "left side of the face. Is this plausible, and what would it be in the early morning?",
     ("In the early evening the sun stands in the west.",
      "Facing north, west is on the left-hand side.",
      "So the light on the left is what one expects. In the morning the sun is in the east, on the "
      "right."),
     "Turning around helps to test it: facing south, the evening sun would be on the right.",
     "plausible; in the morning it would be on the right"),
)  # fmt: skip


def common_sense(rng: random.Random, number: int) -> Exchange:
    """The hand-written problem of this number."""
    question, steps, check, answer = _SENSE[number]
    return Voice(rng).tell(
        "common_sense", question, steps, [check], answer, "In short: {}.", {"number": number}
    )


COMMON_SENSE = len(_SENSE)
GENERATORS = (syllogism, other_tongue)
