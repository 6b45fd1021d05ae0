"""Writes the demo's data: free-text orders and the JSON that a shop's software wants.

    python tools/demo_data.py            writes configs/data/orders_{train,eval}.jsonl
    python tools/demo_data.py --check    exits 1 if the files differ from what would be written

Everything follows from one seed, so the files are the same bytes on every machine. Held-out rows
use names, addresses and items of which no single word occurs in the training texts; `unseen_shares`
measures how many, `check_rows` insists on a third.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "data"
SEED = 7
TRAIN_ROWS, EVAL_ROWS = 240, 96
UNSEEN = 0.65  # chance that a held-out name, address or item is made of held-out words
NEW_PHRASES = 0.3  # chance that a held-out row is worded in a way that training never uses

SYSTEM = "Turn the order into JSON: quantity, item, customer, address, day."

# Values begin with common words or digits: the first word follows a quote mark in the answer but a
# space in the order, so a tokenizer splits a rare word differently in the two places, and a model
# this small misspells what it cannot copy piece by piece. Later words may be as rare as one likes.
FIRST_NAMES = """
Alice Bob John Ben Tim David Paul George Thomas Robert Mary Frank Sarah Charles Michael Henry Arthur
Matthew Joseph Peter Richard Daniel Adam Martin Jack Luke Scott Louis Jeff Victor Jim Elizabeth
Maria Andrew Kim Anne Greg Edward Ken Taylor Stephen Marie Lily Emily Jane Rose Leon Simon Jacob
Anna Michel Chris Neil Jamie Josh Benny Nick Maya Ross Samuel Clark Sam Alex James William Tom Dan
Max Lee Ray Carl Jean Bill Fred Phil Donald Jan Lewis Rob Ali Marc
"""
LAST_NAMES = """
Okafor Lindgren Petrov Tanaka Moreau Silva Novak Haddad Keller Osei Rossi Nakamura Jansen Mensah
Kowalski Duarte Fischer Iyer Larsen Castillo Weber Abebe Romano Chen Dubois Eriksen Farouk Gupta
Hoffman Ivanov Kaplan Lopez Mbeki Nilsson Ortega Patel Quinn Rahman Santos Takeda Ueda Vargas Wagner
Yilmaz Zhou Almeida Bauer Costa Diallo Espinoza Ferrari Gomez Hansen Ito Jovanovic Kimura Laurent
Mazur Nwosu Olsen Pereira Ramos Schmidt Toure Usman Vega Walsh Xu Yeboah Ziegler Achebe Brandt
Carvalho Dimitrov Engel Fonseca Garcia Horvat Ibrahim Juarez Kamau Lindberg Marchetti Ndiaye Oduya
Popov Rosales Sokolov Torres Virtanen Winkler Zielinski Aydin Blanco Cardoso Dvorak Fuentes Grant
Holm Kang Meyer Nunez Park Reyes Sato Thorne Vidal Wood Young Bergman Cruz Doyle Frost Hale Marsh
Pike Reed Tate Vance Wilde York Ashby Bishop Carver Drake Ellis Fisher Gray Hardy
"""
ROADS = """
Lisbon Oslo Nairobi Kyoto Quito Riga Porto Accra Bergen Cairo Delhi Geneva Havana Izmir Jakarta
Krakow Lima Malmo Naples Osaka Prague Rabat Seville Tunis Utrecht Vienna Warsaw Zagreb Athens Bilbao
Cork Dakar Essen Florence Gdansk Hanoi Ibadan Jena Kampala Leeds Madrid Nantes Odense Pisa Recife
Salzburg Tallinn Uppsala Valencia Windhoek Xiamen Yerevan Zurich Aarhus Bogota Cadiz Durban Exeter
Fez Ghent Hobart Innsbruck Jaipur Kigali Lagos Manila Nagoya Ottawa Perth Reykjavik Santiago Turin
Ulm Verona Wellington Almaty Bristol Cardiff Dresden Edinburgh Freiburg Granada Helsinki Istanbul
Kazan Lyon Mombasa Nice Oxford Palermo Rotterdam Sofia Toledo Vilnius Winnipeg Adelaide Brussels
Chicago Denver Glasgow Houston Kobe London Marseille Norwich Orlando Pretoria Rome Sydney Tokyo
Vancouver Zanzibar Antwerp Boston Calgary Dublin Fukuoka Genoa Halifax Ipswich Kolkata Lund Munich
"""
KINDS = """
red blue green yellow purple orange black white brown gold paper glass clay tin iron metal plastic
stone tiny round square woven amber pine big small large old new warm soft sweet simple dark light
bright heavy thin thick flat long short tall wide double electric magnetic solar digital folded
rolling flying floating hidden secret magic quiet fast slow smart modern classic plain printed
broken wild winter summer travel baby mini smooth mixed canvas solid rare strong frozen cool clean
pure happy ocean forest tropical arctic polar river
"""
GOODS = """
lantern kettle compass teapot blanket drum kite mirror candle basket hammer ladder violin clock mug
bucket pillow ribbon trumpet umbrella vase whistle anchor bell button cushion doll feather globe hat
jar key lamp notebook oar pencil quilt ring saddle telescope urn wagon zither apron boot chair desk
easel flute guitar helmet jug lute mask needle owl puppet rug spoon tent accordion bracelet cradle
dinosaur envelope fountain goblet hammock jigsaw kimono locket magnet napkin ornament parrot rocket
sundial tambourine unicorn windmill xylophone yoyo barrel cannon
"""

# Phrases; those after the bar are for held-out rows only.
ORDERS = """
Hello, please send {goods} to {address}. {when} Thanks, {name}
Hi, could you ship {goods} to {address}? {when} {name}
Good morning! I would like {goods} sent to {address}. {when} Best, {name}
Dear shop, we need {goods} here at {address}. {when} Yours, {name}
This is {name}. I want to order {goods}, delivery to {address}. {when}
My name is {name} and I live at {address}. Can I get {goods}? {when}
{name} of {address} wants {goods}. {when}
Phone order: {name}, {address}, {goods}. {when}
{goods} for {name}, to be shipped to {address}. {when}
An order from {name}: {goods}, ship to {address}. {when}
{when} Please put {goods} in the post to {address}. Regards, {name}
{when} It is {name} from {address} again, this time for {goods}.
|
Greetings from {address}! Would you mail me {goods}? {when} Cheers, {name}
Customer {name} asked for {goods}. The parcel goes to {address}. {when}
{when} I am {name}, and my cousin at {address} would love {goods}.
"""
WHEN = """
It must arrive by {day}.
We need it on {day}.
{day} would be perfect.
The party is on {day}!
Any time before {day} is fine.
{day} at the latest.
|
My birthday is {day}!
No hurry, {day} will do.
"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
STREETS = "Street Road Lane Avenue Way Hill".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
OPEN_FIELDS = ("item", "customer", "address")  # the others take a dozen values or fewer


def words(text: str) -> set[str]:
    """The lower-case words of a text: the measure of what training has seen."""
    return set(re.findall(r"[a-z]+", text.lower()))


class Lists:
    """Words and phrases to draw from: `seen` for all rows, `new` for held-out rows only."""

    def __init__(self, rng: random.Random) -> None:
        self.seen: dict[str, list[str]] = {}
        self.new: dict[str, list[str]] = {}
        values: dict[str, str] = {"first": FIRST_NAMES, "last": LAST_NAMES, "road": ROADS}
        for name, block in (values | {"kind": KINDS, "good": GOODS}).items():
            entries = block.split()
            rng.shuffle(entries)
            cut = len(entries) * 7 // 10
            self.seen[name], self.new[name] = entries[:cut], entries[cut:]
        phrases: dict[str, str] = {"order": ORDERS, "when": WHEN}
        for name, block in phrases.items():
            seen, new = block.strip().split("\n|\n")
            self.seen[name], self.new[name] = seen.split("\n"), new.split("\n")


def make_row(rng: random.Random, lists: Lists, held_out: bool) -> dict:
    """One conversation in the messages schema: instruction, order, answer."""

    def pick(chance: float, *names: str) -> list[str]:
        source = lists.new if held_out and rng.random() < chance else lists.seen
        return [rng.choice(source[name]) for name in names]

    quantity, day = rng.randint(1, 12), rng.choice(DAYS)
    item = " ".join(pick(UNSEEN, "kind", "good")) + ("s" if quantity > 1 else "")
    customer = " ".join(pick(UNSEEN, "first", "last"))
    address = " ".join([str(rng.randint(1, 99)), *pick(UNSEEN, "road"), rng.choice(STREETS)])
    order, when = pick(NEW_PHRASES, "order", "when")
    goods = rng.choice([str(quantity), NUMBERS[quantity]]) + " " + item
    text = order.format(goods=goods, address=address, name=customer, when=when.format(day=day))
    answer = dict(quantity=quantity, item=item, customer=customer, address=address, day=day)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text[0].upper() + text[1:]},
            {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
        ]
    }


def order_of(row: dict) -> str:
    """The customer's text of a row."""
    return row["messages"][1]["content"]


def answer_of(row: dict) -> dict:
    """The parsed answer of a row."""
    return json.loads(row["messages"][2]["content"])


def make_rows() -> tuple[list[dict], list[dict]]:
    """The training and the held-out rows, all texts different; the same on every call."""
    rng = random.Random(SEED)
    lists = Lists(rng)
    rows: dict[str, dict] = {}
    while len(rows) < TRAIN_ROWS + EVAL_ROWS:
        row = make_row(rng, lists, held_out=len(rows) >= TRAIN_ROWS)
        rows.setdefault(order_of(row), row)
    everything = list(rows.values())
    return everything[:TRAIN_ROWS], everything[TRAIN_ROWS:]


def unseen_shares(train: list[dict], held_out: list[dict]) -> dict[str, float]:
    """Share of held-out values of which no word but `STREETS` occurs in any training text.

    Returns one share for each of `OPEN_FIELDS`, and `all`, which counts the closed fields too.
    """
    seen = set().union(*(words(order_of(row)) for row in train))
    answers = [answer_of(row) for row in held_out]
    seen -= words(" ".join(STREETS))
    new = {f: sum(not words(a[f]) & seen for a in answers) for f in OPEN_FIELDS}
    shares = {field: count / len(answers) for field, count in new.items()}
    return shares | {"all": sum(new.values()) / sum(len(a) for a in answers)}


def check_rows(train: list[dict], held_out: list[dict]) -> None:
    """Raises AssertionError unless the held-out rows are disjoint, new enough and answerable."""
    both = {order_of(row) for row in train} & {order_of(row) for row in held_out}
    assert not both, f"{len(both)} texts are in both sets"
    for field, share in unseen_shares(train, held_out).items():
        assert share >= 1 / 3, f"only {share:.0%} of the held-out values of {field} are unseen"
    for row in train + held_out:
        for field in OPEN_FIELDS:
            assert answer_of(row)[field] in order_of(row), f"{field} is not verbatim: {row}"


def main() -> None:
    """Writes or checks the two files and prints what they hold."""
    parser = argparse.ArgumentParser(description="Writes the demo's data.")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files; write nothing"
    )
    check = parser.parse_args().check
    train, held_out = make_rows()
    check_rows(train, held_out)
    for name, rows in {"orders_train.jsonl": train, "orders_eval.jsonl": held_out}.items():
        path, text = FOLDER / name, "".join(json.dumps(row) + "\n" for row in rows)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        elif not path.is_file() or path.read_bytes() != text.encode():
            sys.exit(f"{path} is not what {Path(__file__).name} makes - run it without --check")
        print(f"{path.name}: {len(rows)} rows")
    shares = ", ".join(f"{k} {v:.0%}" for k, v in unseen_shares(train, held_out).items())
    print(f"held-out values without a word from the training texts: {shares}")


if __name__ == "__main__":
    main()
