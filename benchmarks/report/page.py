"""The page: every section in its order, as one HTML file that needs no other."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.report import other_tables, quality_tables, words
from benchmarks.report.analysis import claims
from benchmarks.report.data import Quality, Record, Results
from benchmarks.report.markup import Cell, Html, element, joined, text
from benchmarks.report.published import ARXIV, PAPER

TITLE = "Accuracy, bytes and speed of packed key/value caches"
_STYLE = Path(__file__).with_name("style.css")

#: An `<svg>` by the name of its figure; see `benchmarks.report.command`.
Figures = Mapping[str, Html]
Section = Callable[[Results, Figures], Html]


def page(results: Results, figures: Figures) -> str:
    """HTML of all that was measured; what was not is named."""
    parts = [(anchor, heading, section(results, figures)) for anchor, heading, section in _SECTIONS]
    links = (element("li", element("a", heading, href=f"#{anchor}")) for anchor, heading, _ in parts)
    head = joined([
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", TITLE),
        Html(f"<style>\n{_STYLE.read_text()}</style>"),
    ])  # fmt: skip
    body = joined([
        element("header", element("h1", TITLE), _summary(results), _missing(results),
                element("nav", element("ul", *links), aria_label="Sections")),
        element("main", *(_section(*part) for part in parts)),
        element("footer", element("p", "Written from the result files by ", element("code", "attnpack bench report"),
                                  "; every number is in them.")),
    ])  # fmt: skip
    return f'<!DOCTYPE html>\n<html lang="en">\n{element("head", head)}\n{element("body", body)}\n</html>\n'


def _section(anchor: str, heading: str, content: Html) -> Html:
    return Html(f'\n<section id="{anchor}">{element("h2", heading)}\n{content}</section>')


def _summary(results: Results) -> Html:
    if not results.qualities:
        return element("p", "Accuracy was not measured, so that no claim about it can be checked.")
    verdicts = (
        element("li", words.claim(quality, found)) for quality in results.qualities for found in claims(quality)
    )
    return joined([element("p", words.summary(results.qualities)), element("ul", *verdicts)])


def _missing(results: Results) -> Html:
    if not results.missing:
        return Html("")
    items = (element("li", f"{what}: not measured ", element("small", file)) for file, what in results.missing.items())
    return element("div", element("p", "This page is not complete."), element("ul", *items), class_="missing")


def _not_measured(file: str) -> Html:
    return element("p", "Not measured: the results have nothing of ", element("code", file), ".", class_="missing")


def _figure(figure: Html, *caption: Cell) -> Html:
    frame = Html(f'<div class="scroll" tabindex="0">{figure}</div>')
    return element("figure", frame, element("figcaption", *caption))


def _of_models(results: Results, part: Callable[[Quality], Html]) -> Html:
    if not results.qualities:
        return _not_measured("quality-*.json")
    return joined(part(quality) for quality in results.qualities)


def _accuracy(results: Results, figures: Figures) -> Html:
    def part(quality: Quality) -> Html:
        caption = (
            "Accuracy, the mean over tasks, minus that of the dense cache, over dense bytes per counted byte; a point "
            "a method, bars 95 % intervals. Losses of up to one point are on a linear scale, larger ones on a "
            "logarithmic one. Steps: the best accuracy of ours, and of all others, in at most so many bytes. Crosses: "
            f"two rows of the paper, on LLaVA-1.5-7B and A-OKVQA, for orientation only. {words.sample(quality)}."
        )
        heading = element("h3", quality.model, " ", element("small", quality.architecture))
        return joined([heading, _figure(figures[f"accuracy {quality.model}"], caption)])

    return _of_models(results, part)


def _beside_the_paper(results: Results, _: Figures) -> Html:
    if results.qualities:
        speeds = other_tables.speeds(results.speed)
        chosen = f"{quality_tables.selection()} Scores are means over tasks; perplexity is that of the long text."
        own = joined([quality_tables.main_table(results.qualities, speeds), element("p", chosen)])
    else:
        own = _not_measured("quality-*.json")
    source = element("a", f"arXiv {ARXIV}", href=f"https://arxiv.org/abs/{ARXIV}")
    quoted = element(
        "p", f"{PAPER} (", source, "); in brackets points more or less than its full cache. Accuracy, and on OCR-VQA "
        "ROUGE-L. Where the paper gives megabytes alone, the reduction follows from its 328.2 MB. 4-bit sizes are the "
        "16-bit ones over four there, without scales. (E): half of the vision tokens evicted.",
    )  # fmt: skip
    return joined([own, other_tables.paper_table(), quoted])


def _equal_bytes(results: Results, _: Figures) -> Html:
    explained = element(
        "p", "For every reduction that methods were configured for: the most accurate row of ours and of all other "
        "groups that holds at most that many bytes. Where ours is not ahead, that is marked. With so few bytes saved "
        "that no method loses anything, who is ahead is chance: intervals say so.",
    )  # fmt: skip
    return joined([explained, _of_models(results, quality_tables.equal_bytes_table)])


def _throughput(results: Results, figures: Figures) -> Html:
    speed = results.speed
    if speed is None:
        return _not_measured("speed.json")
    caption = (
        f"Tokens per second over the batch, decode steps only; {_shape(speed)}. Filled: the peak of memory while "
        f"decoding fits the cap; hollow: it does not. Circled: the largest batch that fits. {words.made(speed)}."
    )
    found = speed.get("summary") or {}
    ratios = [
        f"{found[f'ratio_to_{kind}']:.2f} times the tokens per second of {name}"
        for kind, name in (("dense", "the fastest dense cache"), ("quantised", "the fastest quantised cache"))
        if found.get(f"ratio_to_{kind}") is not None
    ]
    said = element("p", f"Ours, in the same memory: {', and '.join(ratios)}.") if ratios else Html("")
    return joined([said, _figure(figures["throughput"], caption), other_tables.speed_table(speed)])


def _shape(speed: Record) -> str:
    """The decoder that was timed, its prompts, and the cap."""
    forms = (("layers", "layers: {}"), ("heads", "heads: {}"), ("head_dim", "dims a head: {}"),
             ("tokens", "tokens a prompt: {:,}"))  # fmt: skip
    caps = sorted({row["cap_bytes"] for row in speed["rows"] if "cap_bytes" in row})
    said = [_said(speed, forms), *(f"cap: {cap / 1e6:,.0f} MB beyond the model" for cap in caps)]
    return ", ".join(each for each in said if each)


def _said(record: Record, forms: Sequence[tuple[str, str]]) -> str:
    """What a result file says of its case, as far as it does."""
    return ", ".join(form.format(record[name]) for name, form in forms if name in record)


def _memory(results: Results, figures: Figures) -> Html:
    long = results.long
    if long is None:
        return _not_measured("long.json")
    prompts = _said(long, (("prompts", "prompts in the batch: {}"), ("images", "images a prompt: {}")))
    caption = "Counted bytes of the cache over one long generation, a line a policy"
    caption = f"{f'{caption}; {prompts}' if prompts else caption}. {words.made(long)}."
    return joined([_figure(figures["memory"], caption), other_tables.memory_table(long)])


def _spectra(results: Results, figures: Figures) -> Html:
    def part(quality: Quality) -> Html:
        if not quality.spectra:
            return _not_measured(f"spectra in {quality.file}")
        caption = (
            "Singular values of one layer's keys or values of vision tokens, heads concatenated, over the largest; a "
            f"line a layer. Dashed: the rank of 99 % of the energy, the median over layers. {words.made(quality.made)}."
        )
        figure = _figure(figures[f"spectra {quality.model}"], caption)
        return joined([element("h3", quality.model), figure, other_tables.spectra_table(quality)])

    return _of_models(results, part)


def _all(results: Results, _: Figures) -> Html:
    def part(quality: Quality) -> Html:
        by_task = element("summary", f"{quality.model}: accuracy by task")
        measures = element("summary", f"{quality.model}: every measure of every task")
        tables = (quality_tables.measures_table(quality, task) for task in quality.tasks)
        return joined([
            element("h3", quality.model),
            quality_tables.full_table(quality),
            element("details", by_task, quality_tables.task_table(quality)),
            element("details", measures, *tables),
        ])  # fmt: skip

    mark = element(
        "p", "\N{BLACK DIAMOND} marks rows that no other row beats in both bytes and accuracy. KL is the divergence "
        "from the dense cache's distribution per token; “diverges at” is the mean first token that differs.",
    )  # fmt: skip
    return joined([mark, _of_models(results, part)])


def _counted(results: Results, _: Figures) -> Html:
    if results.counted is None:
        return _not_measured("counted.json")
    explained = element(
        "p", "Caches of published models' head shapes, packed by the backend and counted. The closed form is what "
        "published figures follow: numbers in their bits, without scales, indices or placement. Published figures are "
        f"of each method's own paper, and some are of longer text. {words.made(results.counted)}.",
    )  # fmt: skip
    return joined([explained, other_tables.counted_table(results.counted)])


def _how(results: Results, _: Figures) -> Html:
    asked = {task for quality in results.qualities for task in quality.tasks} | {"long"}
    tasks = [
        Html(element("dt", task) + element("dd", text(what))) for task, what in words.TASKS.items() if task in asked
    ]
    runs = [element("li", words.run(quality)) for quality in results.qualities]
    return joined([
        element("ul", *runs) if runs else Html(""),
        element("h3", "Tasks"),
        element("dl", *tasks),
        element("h3", "Limits"),
        element("ul", *(element("li", limit) for limit in words.LIMITS)),
    ])  # fmt: skip


def _skipped(results: Results, _: Figures) -> Html:
    found = other_tables.skipped_table(results)
    return element("p", "Every method among the results was measured.") if found is None else found


_SECTIONS: tuple[tuple[str, str, Section], ...] = (
    ("accuracy", "Accuracy against bytes", _accuracy),
    ("paper", "Beside the paper", _beside_the_paper),
    ("equal-bytes", "At equal bytes", _equal_bytes),
    ("throughput", "Throughput at a fixed memory cap", _throughput),
    ("memory", "Memory over a long generation", _memory),
    ("spectra", "Singular values", _spectra),
    ("all", "Every method", _all),
    ("counted", "Bytes of published models, counted", _counted),
    ("how", "How it was measured, and limits", _how),
    ("skipped", "Skipped", _skipped),
)
