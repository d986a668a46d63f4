"""Generated word problems with worked solutions; the last line is `#### <answer>`, as in GSM8K."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from raymoe.data.local_corpus.row import REVISION, Row

PROBLEMS_PER_KIND = 260

NAMES = (
    *("Ada", "Ali", "Ana", "Ben", "Chen", "Dan", "Ella", "Eva", "Finn", "Hana"),
    *("Ida", "Ivan", "Jack", "Kofi", "Lea", "Leo", "Lina", "Mia", "Nils", "Nora"),
    *("Omar", "Priya", "Rosa", "Sam", "Tara", "Tom", "Yara", "Zoe"),
)
ITEMS = (
    *("apples", "balls", "books", "buttons", "cakes", "candles", "cards", "coins", "cups", "eggs", "flowers"),
    *("marbles", "oranges", "pears", "pencils", "pens", "plates", "shells", "stamps", "stickers", "toys"),
)
UNITS = (
    *(("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7)),
    *(("metres", "centimetres", 100), ("centimetres", "millimetres", 10), ("feet", "inches", 12)),
    *(("kilograms", "grams", 1000), ("dollars", "cents", 100), ("years", "months", 12)),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A question, its solution line by line and the answer; equal `given` means the same calculation."""

    given: tuple[object, ...]
    question: str
    solution: tuple[str, ...]
    answer: int | str


class Draw:
    """One seeded source of the names, things, numbers and wordings that problems are made of."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """Draw an integer in [low, high]."""
        return self._random.randint(low, high)

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        """Draw `count` integers in [low, high]."""
        return [self.number(low, high) for _ in range(count)]

    def one(self, *choices: T) -> T:
        """Draw one of `choices`."""
        return self._random.choice(choices)

    def two(self, choices: Sequence[str]) -> list[str]:
        """Draw two different `choices`."""
        return self._random.sample(choices, 2)


def math_rows() -> Iterator[Row]:
    """Yield each kind's problems, no calculation twice: none is held out that was seen under other names."""
    for kind, generate in KINDS.items():
        draw = Draw(f"{kind} {REVISION}")
        problems: dict[tuple[object, ...], Problem] = {}
        while len(problems) < PROBLEMS_PER_KIND:
            problem = generate(draw)
            problems.setdefault(problem.given, problem)
        for given, problem in problems.items():
            completion = "\n".join([*problem.solution, f"#### {problem.answer}"])
            yield Row(problem.question, completion, "math", kind, "/".join(map(str, (kind, *given))))


def _arithmetic(draw: Draw) -> Problem:
    a, b, c = draw.numbers(3, 2, 20)
    first, second = draw.one("+", "-", "*"), draw.one("+", "-")
    value = {"+": a + b, "-": a - b, "*": a * b}[first]
    result = value + c if second == "+" else value - c
    ask = draw.one("Compute {}.", "What is {}?", "Work out {} step by step.", "Evaluate {}.")
    steps = (f"{a} {first} {b} = {value}", f"{value} {second} {c} = {result}")
    return Problem((a, first, b, second, c), ask.format(f"{a} {first} {b} {second} {c}"), steps, result)


def _shopping(draw: Draw) -> Problem:
    a, p, b, q = draw.numbers(4, 2, 9)
    name, (x, y) = draw.one(*NAMES), draw.two(ITEMS)
    question = draw.one(
        f"{name} buys {a} {x} for {p} dollars each and {b} {y} for {q} dollars each. What is the total?",
        f"At a market, {name} pays for {a} {x} at {p} dollars each and {b} {y} at {q} dollars each. "
        "What is the total in dollars?",
        f"{name} needs {a} {x} that cost {p} dollars each, and {b} {y} that cost {q} dollars each. "
        f"How many dollars does {name} spend?",
    )
    steps = (
        f"The {x} cost {a} * {p} = {a * p} dollars.",
        f"The {y} cost {b} * {q} = {b * q} dollars.",
        f"Together that is {a * p} + {b * q} = {a * p + b * q} dollars.",
    )
    return Problem((a, p, b, q), question, steps, a * p + b * q)


def _change(draw: Draw) -> Problem:
    note, a, p = draw.one(50, 60, 70, 80, 100), draw.number(2, 9), draw.number(2, 5)
    extra, name, item = draw.number(1, 4), draw.one(*NAMES), draw.one(*ITEMS)
    question = draw.one(
        f"{name} has {note} dollars and buys {a} {item} for {p} dollars each and a bag for {extra} dollars. "
        "How many dollars are left?",
        f"With {note} dollars in hand, {name} takes {a} {item} at {p} dollars each and a drink for {extra} "
        f"dollars. How much change does {name} get, in dollars?",
    )
    total = a * p + extra
    steps = (
        f"The {item} cost {a} * {p} = {a * p} dollars.",
        f"With the rest it is {a * p} + {extra} = {total} dollars.",
        f"There remain {note} - {total} = {note - total} dollars.",
    )
    return Problem((note, a, p, extra), question, steps, note - total)


def _travel(draw: Draw) -> Problem:
    v, t, w, u = draw.number(2, 20), draw.number(2, 6), draw.number(2, 20), draw.number(2, 6)
    name, way = draw.one(*NAMES), draw.one("rides", "sails", "skates", "cycles")
    question = draw.one(
        f"{name} {way} at {v} km per hour for {t} hours and then at {w} km per hour for {u} hours. "
        "How many km is that?",
        f"At {v} km per hour for {t} hours, then at {w} km per hour for {u} hours: how many km is that?",
    )
    steps = (
        f"The first part is {v} * {t} = {v * t} km.",
        f"The second part is {w} * {u} = {w * u} km.",
        f"In all it is {v * t} + {w * u} = {v * t + w * u} km.",
    )
    return Problem((v, t, w, u), question, steps, v * t + w * u)


def _production(draw: Draw) -> Problem:
    rate, box, boxes = draw.number(2, 12), draw.number(2, 10), draw.number(2, 12)
    minutes, item = box * boxes, draw.one(*ITEMS)
    question = draw.one(
        f"A machine makes {rate} {item} per minute and runs for {minutes} minutes. "
        f"Boxes hold {box} {item} each. How many boxes are filled?",
        f"Every minute, {rate} {item} come off a line. After {minutes} minutes they are packed {box} to "
        "a box. How many boxes is that?",
    )
    made = rate * minutes
    steps = (
        f"It makes {rate} * {minutes} = {made} {item}.",
        f"They fill {made} / {box} = {made // box} boxes.",
    )
    return Problem((rate, minutes, box), question, steps, made // box)


def _sequence(draw: Draw) -> Problem:
    start, step, n = draw.number(1, 30), draw.number(2, 9), draw.number(6, 12)
    shown = ", ".join(str(start + step * i) for i in range(4))
    question = draw.one(
        f"The numbers {shown} go on in the same way. What is number {n} of this sequence?",
        f"A sequence starts {shown} and always grows by the same amount. Find its term number {n}.",
    )
    steps = (
        f"It grows by {start + step} - {start} = {step} each time.",
        f"To term {n} there are {n} - 1 = {n - 1} steps.",
        f"They add {n - 1} * {step} = {(n - 1) * step}.",
        f"The term is {start} + {(n - 1) * step} = {start + (n - 1) * step}.",
    )
    return Problem((start, step, n), question, steps, start + (n - 1) * step)


def _percentage(draw: Draw) -> Problem:
    percent, whole = draw.one(10, 20, 25, 30, 40, 50, 75), 20 * draw.number(1, 50)
    part, name = percent * whole // 100, draw.one(*NAMES)
    item = draw.one("coat", "bike", "desk", "lamp", "phone")
    question = draw.one(
        f"A {item} costs {whole} dollars. {name} gets {percent} percent off. What is the price then?",
        f"The price of a {item} is {whole} dollars and falls by {percent} percent. What is it then?",
    )
    steps = (
        f"{percent} percent of {whole} is {whole} * {percent} / 100 = {part}.",
        f"The price is {whole} - {part} = {whole - part} dollars.",
    )
    return Problem((whole, percent), question, steps, whole - part)


def _fraction_of(draw: Draw) -> Problem:
    d, k = draw.number(2, 10), draw.number(2, 15)
    n, whole = draw.number(1, d - 1), d * k
    name, item = draw.one(*NAMES), draw.one(*ITEMS)
    question = draw.one(
        f"{name} has {whole} {item} and gives {n}/{d} of them away. How many {item} are left?",
        f"Of {whole} {item}, {name} sells {n}/{d}. How many {item} remain?",
    )
    steps = (
        f"1/{d} of {whole} is {whole} / {d} = {k}.",
        f"{n}/{d} is {n} * {k} = {n * k} {item}.",
        f"There remain {whole} - {n * k} = {whole - n * k} {item}.",
    )
    return Problem((whole, n, d), question, steps, whole - n * k)


def _fraction_sum(draw: Draw) -> Problem:
    b, d = draw.number(2, 9), draw.number(2, 9)
    a, c = draw.number(1, b), draw.number(1, d)
    total, name = Fraction(a, b) + Fraction(c, d), draw.one(*NAMES)
    question = draw.one(
        f"What is {a}/{b} + {c}/{d} as a fraction in lowest terms?",
        f"{name} drinks {a}/{b} of a litre, then {c}/{d} of a litre. How many litres, in lowest terms?",
    )
    steps = (
        f"{a}/{b} = {a * d}/{b * d}",
        f"{c}/{d} = {c * b}/{b * d}",
        f"{a * d}/{b * d} + {c * b}/{b * d} = {a * d + c * b}/{b * d}",
        f"{a * d + c * b}/{b * d} = {total}",
    )
    return Problem((a, b, c, d), question, steps, str(total))


def _units(draw: Draw) -> Problem:
    large, small, factor = draw.one(*UNITS)
    a, b = draw.number(2, 12), draw.number(1, min(factor - 1, 50))
    question = draw.one(
        f"How many {small} are {a} {large} and {b} {small}?",
        f"Convert {a} {large} and {b} {small} to {small}.",
    )
    steps = (
        f"{a} {large} are {a} * {factor} = {a * factor} {small}.",
        f"With the rest it is {a * factor} + {b} = {a * factor + b} {small}.",
    )
    return Problem((large, a, b), question, steps, a * factor + b)


def _ages(draw: Draw) -> Problem:
    age, more, times = draw.number(3, 15), draw.number(2, 12), draw.number(2, 4)
    x, y = draw.two(NAMES)
    z = draw.one(*(name for name in NAMES if name not in (x, y)))
    question = draw.one(
        f"{x} is {age} years old. {y} is {more} years older than {x}, and {z} {times} times as old as "
        f"{y}. How old is {z}?",
        f"{x} is {age}, {y} is older by {more} years, and {z} has {times} times {y}'s age. How old is {z}?",
    )
    steps = (
        f"{y} is {age} + {more} = {age + more} years old.",
        f"{z} is {times} * {age + more} = {times * (age + more)} years old.",
    )
    return Problem((age, more, times), question, steps, times * (age + more))


def _rectangle(draw: Draw) -> Problem:
    a, b, price = draw.number(2, 20), draw.number(2, 20), draw.number(2, 5)
    thing = draw.one("garden", "field", "yard", "park")
    question = draw.one(
        f"A {thing} is {a} metres long and {b} metres wide. A fence around it costs {price} dollars per "
        "metre. What does the fence cost in dollars?",
        f"The sides of a {thing} are {a} metres and {b} metres. Fencing it in costs {price} dollars a metre."
        " How many dollars is that?",
    )
    around = 2 * (a + b)
    steps = (
        f"Two sides are {a} + {b} = {a + b} metres.",
        f"The fence is 2 * {a + b} = {around} metres long.",
        f"It costs {around} * {price} = {around * price} dollars.",
    )
    return Problem((a, b, price), question, steps, around * price)


def _average(draw: Draw) -> Problem:
    mean = draw.number(5, 20)
    a, b = draw.number(2, mean + 2), draw.number(2, mean + 2)
    c, name, item = 3 * mean - a - b, draw.one(*NAMES), draw.one(*ITEMS)
    question = draw.one(
        f"{name} finds {a}, {b} and {c} {item} on three days. How many is that per day on average?",
        f"What is the average of {a}, {b} and {c}?",
    )
    steps = (
        f"{a} + {b} = {a + b}",
        f"{a + b} + {c} = {3 * mean}",
        f"{3 * mean} / 3 = {mean}",
    )
    return Problem((a, b, c), question, steps, mean)


def _sharing(draw: Draw) -> Problem:
    people, each = draw.number(3, 12), draw.number(2, 12)
    left, item = draw.number(1, people - 1), draw.one(*ITEMS)
    total = people * each + left
    question = draw.one(
        f"{total} {item} are shared equally among {people} children. How many {item} are left over?",
        f"A teacher gives {total} {item} to {people} children, each as many as the others. "
        f"How many {item} can't be given out?",
    )
    steps = (
        f"Each gets {each}, because {people} * {each} = {people * each}.",
        f"There are {total} - {people * each} = {left} left over.",
    )
    return Problem((total, people), question, steps, left)


def _equation(draw: Draw) -> Problem:
    a, x, b = draw.number(2, 9), draw.number(2, 12), draw.number(1, 20)
    c, name = a * x + b, draw.one(*NAMES)
    question = draw.one(
        f"Solve {a} * x + {b} = {c} for x.",
        f"{name} thinks of a number, multiplies it by {a}, adds {b} and gets {c}. What is the number?",
    )
    steps = (f"Without the {b} it is {c} - {b} = {a * x}.", f"The number is {a * x} / {a} = {x}.")
    return Problem((a, b, c), question, steps, x)


def _stock(draw: Draw) -> Problem:
    start, days, sold, came = draw.number(60, 99), draw.number(2, 6), draw.number(2, 9), draw.number(5, 40)
    item = draw.one(*ITEMS)
    question = draw.one(
        f"A shop has {start} {item}. For {days} days it sells {sold} {item} a day, then {came} new ones "
        f"arrive. How many {item} does it have now?",
        f"From {start} {item}, in {days} days {sold} are taken each day, and {came} are put back afterwards."
        f" How many {item} are there then?",
    )
    rest = start - days * sold
    steps = (
        f"Gone are {days} * {sold} = {days * sold} {item}.",
        f"There remain {start} - {days * sold} = {rest} {item}.",
        f"Then there are {rest} + {came} = {rest + came} {item}.",
    )
    return Problem((start, days, sold, came), question, steps, rest + came)


KINDS: dict[str, Callable[[Draw], Problem]] = {
    "arithmetic": _arithmetic,
    "shopping": _shopping,
    "change": _change,
    "travel": _travel,
    "production": _production,
    "sequence": _sequence,
    "percentage": _percentage,
    "fraction_of": _fraction_of,
    "fraction_sum": _fraction_sum,
    "units": _units,
    "ages": _ages,
    "rectangle": _rectangle,
    "average": _average,
    "sharing": _sharing,
    "equation": _equation,
    "stock": _stock,
}
