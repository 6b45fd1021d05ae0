"""PaddleNLP's chat_template.json -> a jinja chat template of Hugging Face's kind.

Its strings are jinja themselves: `system` (optional, with the system text as `system`), the two
parts of `conversation` (with `user` and `bot`) and `query`, which renders a last question that
waits for its answer. All know `index` (of the round, from 0) and `length` (number of rounds). BOS
and EOS stand in them where they are wanted.
"""

import json
from pathlib import Path

from jaxtune.errors import ConfigError

START = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
    "{% set turns = messages[1:] if system is defined else messages %}"
    "{% set length = (turns | length + 1) // 2 %}"
)
TURN = "{% for message in turns %}{% set index = loop.index0 // 2 %}"
QUERY = "{% if message.role == 'user' and loop.last %}{% set query = message.content %}"
USER = "{% elif message.role == 'user' %}{% set user = message.content %}"
BOT = "{% elif message.role == 'assistant' %}{% set bot = message.content %}"
END = "{% endif %}{% endfor %}"
# White space of a string beside a tag would be trimmed with the tag.
GUARD = "{{ '' }}"


def read_template(path: str) -> str:
    """The jinja template of a chat_template.json.

    Raises:
        ConfigError: the file is missing or not of that form.
    """
    try:
        given = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        user, bot = given["conversation"]
        query = given.get("query") or "{{ query }}"
        parts = [START, given.get("system") or "", TURN + QUERY, query, USER, user, BOT, bot, END]
        return GUARD.join(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"data.template={path} is no chat template of PaddleNLP: {error!r} - it must be a JSON "
            "object with conversation (two strings), query and system"
        ) from error
