"""The small vision-language model that comes with this repository, and questions about images it has never seen."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, LlavaForConditionalGeneration

from attnpack_fx.demo.digits import Question, held_out_questions

FOLDER = Path(__file__).parents[1] / "benchmarks" / "assets" / "digits-llava"


def load(**options: Any) -> tuple[Any, Any]:
    """Return the model and its processor. options: further arguments of `from_pretrained`."""
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype="float32", **options).eval()
    return model, AutoProcessor.from_pretrained(FOLDER)


def questions(count: int, seed: int = 0) -> list[Question]:
    """Return questions to read one of 16 images of handwritten digits: 1,024 vision tokens a prompt."""
    return held_out_questions("read", images=16, count=count, seed=seed)


def prepared(processor: Any, asked: list[Question]) -> Any:
    """Return what `generate` takes for a batch of questions."""
    images, prompts = [list(each.images) for each in asked], [each.prompt for each in asked]
    return processor(images=images, text=prompts, return_tensors="pt")


def right(processor: Any, asked: list[Question], sequences: Any) -> str:
    """Say how many answers, the ends of `sequences`, are right."""
    texts = [each.strip() for each in processor.batch_decode(sequences, skip_special_tokens=True)]
    count = sum(text.endswith(each.answer) for text, each in zip(texts, asked, strict=True))
    return f"{count} of {len(asked)} answers are right"
