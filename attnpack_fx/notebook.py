"""Reports in notebooks."""

from html import escape


class ShownAsText:
    """Shown in a notebook as `print` shows it: in columns, as wide as they are, whatever is in the text."""

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre; overflow-x: auto">{escape(str(self))}</pre>'
