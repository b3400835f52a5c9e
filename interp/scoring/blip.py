"""BLIP-VQA: whether a picture shows what the noun phrases of a prompt say (T2I-CompBench, arXiv:2307.06350)."""

import re

import numpy as np
import torch

from interp.scoring.clip import loaded

BLIP_MODEL = "Salesforce/blip-vqa-base"

# What separates noun phrases, and phrases that name a place and not a thing.
BREAKS = (
    "and or but with without on in at of to from by for is are was were be that which who there it its under over above "
    "below beside behind between near into onto around against inside outside across through left right"
).split()
NO_THINGS = {"top", "side", "front", "back", "bottom", "photo", "picture", "painting", "drawing", "image"}
ARTICLES = {"a", "an", "the", "some", "one"}


class BlipVQA:
    """Product over the prompt's noun phrases of the probability of "yes" to "<phrase>?", by BLIP, 0 to 1.

    The recipe of T2I-CompBench, whose noun chunks are spaCy's; here a phrase ends at punctuation, a preposition, a
    conjunction or a verb "to be" (`noun_phrases`). Better, bring questions of your own in a column: a text with question
    marks is taken as questions, "a red circle? a blue star?", so `blip_vqa:questions` scores against them.

    Option `blip_model`: a Hub id or folder of a BlipForQuestionAnswering; default Salesforce/blip-vqa-base.
    """

    def __init__(self, *, blip_model: str = BLIP_MODEL, device: str = "cpu") -> None:
        from transformers import BlipForQuestionAnswering, BlipProcessor

        self.device = device
        self.model = loaded(BlipForQuestionAnswering, blip_model, "BLIP", "blip_model").to(device).eval()
        self.processor = loaded(BlipProcessor, blip_model, "BLIP", "blip_model")
        self.yes = self.processor.tokenizer("yes", add_special_tokens=False).input_ids[0]

    @torch.no_grad()
    def __call__(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """Return the product for each picture (sample,); NaN where a text has no phrase."""
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt").pixel_values.to(self.device)
        seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
        found = []
        for picture, text in zip(seen, texts, strict=True):
            asked = questions(text)
            found.append(float(self._yes(picture, asked).prod()) if asked else float("nan"))
        return np.array(found)

    def _yes(self, picture: torch.Tensor, asked: list[str]) -> torch.Tensor:
        """Return P("yes") as the first word of the answer to each question about a picture (position, feature)."""
        inputs = self.processor.tokenizer(asked, return_tensors="pt", padding=True, truncation=True).to(self.device)
        mask = inputs.attention_mask
        read = self.model.text_encoder(
            input_ids=inputs.input_ids, attention_mask=mask,
            encoder_hidden_states=picture.expand(len(asked), -1, -1),
        ).last_hidden_state  # fmt: skip
        start = torch.full((len(asked), 1), self.model.decoder_start_token_id, device=self.device)
        out = self.model.text_decoder(input_ids=start, encoder_hidden_states=read, encoder_attention_mask=mask)
        return out.logits[:, -1].float().softmax(-1)[:, self.yes]


def questions(text: str) -> list[str]:
    """Return the questions in a text, or those that its noun phrases make.

    >>> questions("a red circle? is it large?"), questions("a red circle left of a star")
    (['a red circle?', 'is it large?'], ['a red circle?', 'a star?'])
    """
    if "?" in text:
        return [f"{part.strip()}?" for part in text.split("?") if part.strip()]
    return [f"{phrase}?" for phrase in noun_phrases(text)]


def noun_phrases(text: str) -> list[str]:
    """Return the phrases of a text that may name things, by words that end a phrase.

    >>> noun_phrases("a photo of a large red circle, and two dogs on the left")
    ['a large red circle', 'two dogs']
    """
    found: list[list[str]] = [[]]
    for word in re.findall(r"[\w'-]+|[^\w\s]", text.lower()):
        if word in BREAKS or not re.match(r"\w", word):
            found.append([])
        elif word in ARTICLES and found[-1]:
            found.append([word])
        else:
            found[-1].append(word)
    named = [[w for w in phrase if w not in ARTICLES] for phrase in found]
    return [" ".join(p) for p, words in zip(found, named, strict=True) if words and not NO_THINGS.issuperset(words)]
