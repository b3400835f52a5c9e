"""BLIP-VQA: whether a picture shows what the noun phrases of a prompt say (T2I-CompBench, arXiv:2307.06350)."""

import re

import numpy as np
import torch

from interp.scoring.clip import loaded

BLIP_MODEL = "Salesforce/blip-vqa-base"

# What separates noun phrases, and phrases that name a place and not a thing.
BREAKS = {
    "and", "or", "but", "with", "without", "on", "in", "at", "of", "to", "from", "by", "for", "is", "are", "was", "were", "be",
    "that", "which", "who", "there", "it", "its", "under", "over", "above", "below", "beside", "behind", "between", "near",
    "into", "onto", "around", "against", "inside", "outside", "across", "through", "left", "right",
}  # fmt: skip
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
        asked = [(picture, question) for picture, text in enumerate(texts) for question in questions(text)]
        found = np.full(len(texts), np.nan)
        for picture, chance in zip([p for p, _ in asked], self._yes(seen, asked), strict=True):
            found[picture] = chance * (1.0 if np.isnan(found[picture]) else found[picture])
        return found

    def _yes(self, seen: torch.Tensor, asked: list[tuple[int, str]]) -> list[float]:
        """Return P("yes") as the first word of the answer to each (picture, question).

        Questions of equally many tokens go together, without padding: transformers' decoder looks at padding too, so
        that an answer would depend on its neighbours (5.23, and so does `generate`).
        """
        tokens = [self.processor.tokenizer(question, truncation=True).input_ids for _, question in asked]
        found = [float("nan")] * len(asked)
        for length in sorted({len(t) for t in tokens}):
            mine = [k for k, t in enumerate(tokens) if len(t) == length]
            ids = torch.tensor([tokens[k] for k in mine], device=self.device)
            pictures = seen[[asked[k][0] for k in mine]]
            read = self.model.text_encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=pictures
            ).last_hidden_state
            start = torch.full((len(mine), 1), self.model.decoder_start_token_id, device=self.device)
            out = self.model.text_decoder(input_ids=start, encoder_hidden_states=read).logits[:, -1]
            for k, chance in zip(mine, out.float().softmax(-1)[:, self.yes].tolist(), strict=True):
                found[k] = chance
        return found


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
