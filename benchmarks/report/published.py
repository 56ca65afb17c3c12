"""Figures of the papers, for comparison: none of them was measured here, and none is of the models measured here."""

from dataclasses import dataclass

PAPER = "AttentionPack, CVPR 2026"
ARXIV = "2603.23914"


@dataclass(frozen=True)
class Figure:
    """One row of AttentionPack's tables, on `model`.

    reduction: of the cache. megabytes: of the cache of one sample, where the paper gives them. throughput: change in
    per cent. scores: by data set, in per cent: accuracy, and ROUGE-L on OCR-VQA. dense: scores of the same model with
    the full cache, where they are known.
    """

    model: str
    method: str
    reduction: float
    megabytes: float | None = None
    throughput: float | None = None
    scores: tuple[tuple[str, float], ...] = ()
    dense: tuple[tuple[str, float], ...] = ()

    @property
    def differences(self) -> dict[str, float]:
        """Scores minus those of the full cache, in points."""
        dense = dict(self.dense)
        return {name: score - dense[name] for name, score in self.scores if name in dense}


_FULL = (("A-OKVQA", 76.64), ("OCR-VQA", 51.05), ("MMMU", 34.68))
_MEGABYTES = 328.2


def _llava(
    method: str, reduction: float, aokvqa: float, ocrvqa: float, mmmu: float | None = None, **others: float
) -> Figure:
    scores = (("A-OKVQA", aokvqa), ("OCR-VQA", ocrvqa), *((("MMMU", mmmu),) if mmmu else ()))
    return Figure("LLaVA-1.5-7B", method, reduction, scores=scores, dense=_FULL, **others)


def _megabytes(method: str, size: float, throughput: float, aokvqa: float, ocrvqa: float) -> Figure:
    return _llava(method, _MEGABYTES / size, aokvqa, ocrvqa, megabytes=size, throughput=throughput)


FIGURES = (
    Figure("LLaVA-1.5-7B", "full cache, fp16", 1.0, _MEGABYTES, scores=_FULL),
    _llava("64/128", 3.92, 76.75, 52.47),
    _llava("64/64", 5.09, 76.88, 52.44, 34.59, megabytes=64.5, throughput=54),
    _llava("32/64", 5.98, 76.46, 52.00),
    _llava("32/32", 7.24, 75.91, 51.69),
    _llava("16/16", 9.18, 72.13, 48.44),
    _megabytes("64/64 (E)", 62.1, 70, 76.88, 51.63),
    _megabytes("64/64, 4-bit", 16.1, 97, 75.27, 50.18),
    _megabytes("64/64, 4-bit (E)", 15.5, 115, 75.27, 49.11),
    _megabytes("KVQuant-4bit", 82.1, 49, 75.90, 50.67),
    _llava("MiniCache", 4.51, 76.54, 51.93, 33.75, throughput=44),
    Figure(
        "LLaVA-1.5-13B",
        "64/64",
        5.17,
        throughput=43,
        scores=(("A-OKVQA", 81.25), ("OCR-VQA", 53.22), ("MMMU", 36.38)),
    ),
    Figure(
        "QwenVL-Chat",
        "64/64",
        2.77,
        throughput=61,
        scores=(("A-OKVQA", 75.33), ("OCR-VQA", 68.45), ("MMMU", 35.72)),
    ),
    Figure("Video-LLaVA", "128/128", 8.11, throughput=60, scores=(("MSVD-QA", 69.21), ("MSRVTT-QA", 55.47))),
)
#: Those that stand in figures as a reference: ratio, points lost on A-OKVQA.
REFERENCES = tuple(
    (figure.method, figure.reduction, figure.differences["A-OKVQA"])
    for figure in FIGURES
    if figure.method in ("64/64", "64/64, 4-bit (E)") and figure.dense
)
