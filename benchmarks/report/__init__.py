"""One page, figures and a Markdown table from the result files of the evaluation.

    attnpack bench report [--results FOLDER] [--out FOLDER]        # or: python -m benchmarks.report

`data` reads result files, whichever are there; `analysis` is what the page claims, computed from rows; `published` has
the paper's own figures. `accuracy` and `curves` draw, `drawing` says how figures look as PNG and on the page. `words`
has sentences, `quality_tables` and `other_tables` tables, `page` puts them together; `markdown` is the short table for
a README. `markup` knows HTML, and how numbers are written.

Nothing is measured here, and what is missing is named on the page, not filled in.
"""
