"""A profile as one HTML page that needs nothing else: style, script and numbers are in it."""

from __future__ import annotations

import html as _html
import json
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("page.html")


def html(result: dict[str, Any]) -> str:
    """The page.

    Args:
        result: what `profile` returns. It is in the page as JSON, in the element ``profile``, and all that is shown is
            made of it.
    """
    # Within a script element `</` could end it, and `<!--` begin a comment; in JSON `<` stands in strings only.
    data = json.dumps(result).replace("<", "\\u003c")
    title = _html.escape(f"{result['model']}: bytes held for the backward pass")
    return _TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", title).replace("{{profile}}", data)
