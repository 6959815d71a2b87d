"""Clips that a pair has not seen, with their prompts: synthesised ones for the pocket pair, or those of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.session import DataSet
from edgecloud_sd.config import Settings
from edgecloud_sd.data.prompts import LANGUAGES
from edgecloud_sd.events import Prompt
from edgecloud_sd.pipeline import Pipeline, Request
from edgecloud_sd.pocket import clips, voices


@dataclass(frozen=True)
class HeldOutClip:
    """A clip with its prompt and its references. It has `attributes` if its first reference names them all."""

    file_id: str
    language: str
    prompt: Prompt
    references: tuple[str, ...]
    attributes: voices.Attributes | None = None


def iterate_held_out(
    pipeline: Pipeline, settings: Settings, language: str, count: int, set_name: str = "held-out"
) -> Iterator[HeldOutClip]:
    """Yield up to `count` clips in a language: of a set of `pocket.clips.SETS`, or the first ones of a data set.

    Pocket clips stay the same if `count` grows. No two languages share one. Raise ValueError for a clip that cannot be
    used, or warn of it if the run leaves it out.
    """
    if settings.dataset_path != clips.POCKET:
        data = DataSet(replace(settings, max_samples=count), language)
        for skipped in data.skipped:
            warnings.warn(f"{skipped.file_id} is left out: {skipped.reason}", stacklevel=2)
        for entry in data.clips:
            attributes = voices.read_attributes(entry.references[0], language)
            prompt = _fitting_prompt(pipeline, settings, data.request(entry))
            yield HeldOutClip(entry.file_id, language, prompt, entry.references, attributes)
        return
    for index in range(LANGUAGES.index(language), count * len(LANGUAGES), len(LANGUAGES)):
        clip = clips.make_clip(set_name, index)
        words = clip.transcription if settings.with_transcription == "yes" else None
        request = Request(clip.samples, language, settings.prompt_type, words, settings.own_task(language))
        yield HeldOutClip(
            f"pocket_{set_name}_{index:04d}",
            language,
            _fitting_prompt(pipeline, settings, request),
            (clip.caption(language),),
            clip.attributes,
        )


def _fitting_prompt(pipeline: Pipeline, settings: Settings, request: Request) -> Prompt:
    """Return the prompt of a request. Raise ValueError if it and its output do not fit into a model."""
    prompt = pipeline.prompt(request)
    pipeline.check_fits(prompt, "speculative", settings.max_new_tokens)
    return prompt
