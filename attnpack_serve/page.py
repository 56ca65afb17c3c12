"""The page that is served to a browser, and the headers that keep anything else from running in it."""

import base64
import functools
import hashlib
import re
from importlib.resources import files

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@functools.cache
def page() -> tuple[str, dict[str, str]]:
    """Read the page and make its headers.

    Returns:
        The HTML, to be sent as UTF-8 without a change, and headers by name. By them a browser runs the page's own
        script alone, known by its hash, lets it talk to the server it came from alone, and refuses to show the page in
        a frame.
    """
    html = files("attnpack_serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {kind: _hash(content) for kind, content in _INLINE.findall(html)}
    policy = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # No text becomes HTML, not even by a mistake in the script.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return html, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
