"""One page, figures and a Markdown table from the result files of the evaluation.

    attnpack bench report [--results FOLDER] [--out FOLDER]        # or: python -m benchmarks.report

`data` reads result files, whichever are there; `analysis` is what the page claims, computed from rows; `published` has
the paper's own figures; `figures` and `small_figures` draw, `drawing` says how they look on paper and on the page;
`quality_tables`, `other_tables` and `sections` are parts of the page, `page` puts them together, `markdown` is the
short table for a README. Nothing is measured here, and nothing that is missing is filled in: the page names it.
"""
