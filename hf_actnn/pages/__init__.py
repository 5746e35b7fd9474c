"""Results as HTML pages that need nothing else: style, script and numbers are in them."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from hf_actnn.errors import NotAvailableError, message

_FOLDER = Path(__file__).parent
#: Colours of series, in pages and pictures: those of Okabe and Ito, which stay apart for most who see colours
#: differently; what has none of its own gets the last one.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
OTHERS = "#999999"


def fill(name: str, title: str, data: Any) -> str:
    """A page.

    Args:
        name: of the page's own part, a file of this folder without its ending.
        title: of the page, as plain text.
        data: what JSON can hold. It is in the page in the element ``data``, and all that is shown is made of it.
    """
    parts = {
        "title": html.escape(title),
        "style": _read("style.css"),
        "script": _read("common.js"),
        # Within a script element `</` could end it, and `<!--` begin a comment; in JSON `<` stands in strings only.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    whole = _read("frame.html").replace("{{body}}", _read(f"{name}.html"))
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], whole)


def need_matplotlib(where: str) -> None:
    """Refuse a picture that cannot be drawn.

    Args:
        where: what asked for it, for the message.

    Raises:
        NotAvailableError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise NotAvailableError(
            message(
                "a picture needs matplotlib, which is not installed",
                where=where,
                next_step='pip install "hf-actnn[plots]", or take the HTML page, which needs nothing',
            )
        )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
