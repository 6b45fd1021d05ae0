"""Writes the demo's data: free-text orders and the JSON that a shop's software wants.

    python tools/demo_data.py            writes configs/data/orders_{train,eval}.jsonl
    python tools/demo_data.py --check    exits 1 if the files differ from what would be written

Everything follows from one seed, so the files are the same bytes on every machine. Held-out rows
use names, towns and items of which no single word occurs in the training texts; `unseen_shares`
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
TRAIN_ROWS, EVAL_ROWS = 300, 96
UNSEEN = 0.65  # chance that a held-out name, town or item is made of held-out words
NEW_PHRASES = 0.3  # chance that a held-out row is worded in a way that training never uses

SYSTEM = "Turn the order into JSON: quantity, item, customer, city, day."

FIRST_NAMES = """
Mara Tomas Ingrid Kofi Leila Hugo Yuki Amara Stefan Priya Oscar Nadia Pavel Zainab Felix Rosa Emeka
Greta Ravi Chloe Dmitri Aisha Lars Bianca Hassan Mei Jonas Fatima Marco Olga Kwame Sigrid Lucia
Viktor Noor Pedro Hana Walter Imani Elias Petra Samir Freya Diego Akiko Boris Camila Farid Agnes
Theo Salma Rafael Klara Omar Wanda Nikhil Helga Matteo Yara Bruno Linh Casper Dalia Ivan Esther
Jamal Signe Carlos Tuva Arjun Monika Gustav Layla Enzo Marit Tariq Vera Milan Zora Hamid Beatriz
Oleg Keiko Simon Asha Konrad Paloma Idris Tessa Renzo Mina Adnan Carmen Sven Thandi Louis Irina
Rashid Nora Fabio Elin Malik Selma Otto Juno Gideon Maeve Silas Opal Winston Edgar Hazel
Ruben Flora Clive Ada Ernest Ruth Basil Nell Cyrus Willa Magnus Ivy Dexter Fern Rufus Mabel
""".split()
LAST_NAMES = """
Okafor Lindgren Petrov Tanaka Moreau Silva Novak Haddad Keller Osei Rossi Nakamura Jansen Mensah
Kowalski Duarte Fischer Iyer Larsen Castillo Weber Abebe Romano Chen Dubois Eriksen Farouk Gupta
Hoffman Ivanov Kaplan Lopez Mbeki Nilsson Ortega Patel Quinn Rahman Santos Takeda Ueda Vargas Wagner
Yilmaz Zhou Almeida Bauer Costa Diallo Espinoza Ferrari Gomez Hansen Ito Jovanovic Kimura Laurent
Mazur Nwosu Olsen Pereira Ramos Schmidt Toure Usman Vega Walsh Xu Yeboah Ziegler Achebe Brandt
Carvalho Dimitrov Engel Fonseca Garcia Horvat Ibrahim Juarez Kamau Lindberg Marchetti Ndiaye Oduya
Popov Rosales Sokolov Torres Virtanen Winkler Zielinski Aydin Blanco Cardoso Dvorak Fuentes Grant
Holm Kang Meyer Nunez Park Reyes Sato Thorne Vidal Wood Young Bergman Cruz Doyle Frost Hale
Marsh Pike Reed Stone Tate Vance Wilde York Ashby Bishop Carver Drake Ellis Fisher Gray Hardy
""".split()
TOWNS = """
Lisbon Oslo Nairobi Kyoto Quito Riga Porto Accra Bergen Cairo Delhi Geneva Havana Izmir Jakarta
Krakow Lima Malmo Naples Osaka Prague Rabat Seville Tunis Utrecht Vienna Warsaw Zagreb Athens Bilbao
Cork Dakar Essen Florence Gdansk Hanoi Ibadan Jena Kampala Leeds Madrid Nantes Odense Pisa Recife
Salzburg Tallinn Uppsala Valencia Windhoek Xiamen Yerevan Zurich Aarhus Bogota Cadiz Durban Exeter
Fez Ghent Hobart Innsbruck Jaipur Kigali Lagos Manila Nagoya Ottawa Perth Reykjavik Santiago Turin
Ulm Verona Wellington Almaty Bristol Cardiff Dresden Edinburgh Freiburg Granada Helsinki Istanbul
Kazan Lyon Mombasa Nice Oxford Palermo Rotterdam Sofia Toledo Vilnius Winnipeg Adelaide Brussels
Chicago Denver Glasgow Houston Kobe London Marseille Norwich Orlando Pretoria Rome Sydney Tokyo
Vancouver Zanzibar Antwerp Boston Calgary Dublin Fukuoka Genoa Halifax Ipswich Kolkata Lund Munich
""".split()
MATERIALS = """
brass copper oak wool silver paper glass velvet clay tin bamboo leather amber marble linen pine
silk iron jade coral cotton walnut bronze wicker pearl steel cedar felt rubber red blue green
yellow purple orange pink black white golden tiny giant round square striped spotted folding painted
carved woven glowing musical antique wooden mossy frosted speckled hollow polished tartan checkered
crystal plaid rainbow turquoise crimson scarlet indigo violet
""".split()
GOODS = """
lantern kettle compass teapot blanket drum kite mirror candle basket hammer ladder violin clock mug
bucket pillow ribbon trumpet umbrella vase whistle anchor bell button cushion doll feather
globe hat jar key lamp notebook oar pencil quilt ring saddle telescope urn wagon zither apron
boot chair desk easel flute guitar helmet jug lute mask needle owl puppet rug spoon tent
accordion bracelet cradle dinosaur envelope fountain goblet hammock jigsaw kimono locket magnet
napkin ornament parrot rocket sundial tambourine unicorn windmill xylophone yoyo barrel cannon
""".split()

# Phrases; those after the bar are for held-out rows only.
ORDERS = """
Hello, please send {goods} to {city}. {when} Thanks, {name}
Hi, could you ship {goods} to {city}? {when} {name}
Good morning! I would like {goods} sent to {city}. {when} Best, {name}
Dear shop, we need {goods} here in {city}. {when} Yours, {name}
This is {name}. I want to order {goods}, delivery to {city}. {when}
My name is {name} and I live in {city}. Can I get {goods}? {when}
{name} from {city} wants {goods}. {when}
Phone order: {name}, {city}, {goods}. {when}
{goods} for {name}, to be shipped to {city}. {when}
New order from {name}: {goods}, ship to {city}. {when}
{when} Please put {goods} in the post to {city}. Regards, {name}
{when} It is {name} in {city} again, this time for {goods}.
|
Greetings from {city}! Would you mail me {goods}? {when} Cheers, {name}
Customer {name} asked for {goods}. The parcel goes to {city}. {when}
{when} I am {name}, and my cousin in {city} would love {goods}.
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
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
OPEN_FIELDS = ("item", "customer", "city")  # the others come from the closed sets above


def words(text: str) -> set[str]:
    """The lower-case words of a text: the measure of what training has seen."""
    return set(re.findall(r"[a-z]+", text.lower()))


class Lists:
    """Words and phrases to draw from: `seen` for all rows, `new` for held-out rows only."""

    def __init__(self, rng: random.Random) -> None:
        self.seen: dict[str, list[str]] = {}
        self.new: dict[str, list[str]] = {}
        values = {"first": FIRST_NAMES, "last": LAST_NAMES, "city": TOWNS}
        for name, entries in (values | {"material": MATERIALS, "good": GOODS}).items():
            entries = rng.sample(entries, len(entries))
            cut = len(entries) * 7 // 10
            self.seen[name], self.new[name] = entries[:cut], entries[cut:]
        for name, block in {"order": ORDERS, "when": WHEN}.items():
            seen, new = block.strip().split("\n|\n")
            self.seen[name], self.new[name] = seen.split("\n"), new.split("\n")


def make_row(rng: random.Random, lists: Lists, held_out: bool) -> dict:
    """One conversation in the messages schema: instruction, order, answer."""

    def pick(chance: float, *names: str) -> list[str]:
        source = lists.new if held_out and rng.random() < chance else lists.seen
        return [rng.choice(source[name]) for name in names]

    quantity, day = rng.randint(1, 12), rng.choice(DAYS)
    item = " ".join(pick(UNSEEN, "material", "good")) + ("s" if quantity > 1 else "")
    customer = " ".join(pick(UNSEEN, "first", "last"))
    (city,) = pick(UNSEEN, "city")
    order, when = pick(NEW_PHRASES, "order", "when")
    goods = rng.choice([str(quantity), NUMBERS[quantity]]) + " " + item
    text = order.format(goods=goods, city=city, name=customer, when=when.format(day=day))
    answer = dict(quantity=quantity, item=item, customer=customer, city=city, day=day)
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
    """Share of held-out values of which no word occurs in any training text.

    Returns one share for each of `OPEN_FIELDS`, and `all`, which counts the closed fields too.
    """
    seen = set().union(*(words(order_of(row)) for row in train))
    answers = [answer_of(row) for row in held_out]
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
