"""The conformance suite can fail: each mistake that an author could make is found by the check that is about it."""

import pytest
import torch

from interp.families import AttentionSite, Spans
from interp.families.auraflow import AuraFlowFamily
from interp.families.flux import FluxFamily
from interp.families.pixart import PixArtFamily
from interp.families.sd3 import SD3Family
from interp.testing import check_family
from tests.families.pipelines import BUILDERS

SHORT = {"max_sequence_length": 24}


class TextLast(FluxFamily):
    def spans(self, site, queries, keys, kwargs):
        text = kwargs["encoder_hidden_states"].shape[1]
        image, rest = slice(0, queries - text), slice(queries - text, queries)
        return Spans(image, rest, image, rest)


class RegistersAsText(AuraFlowFamily):
    def spans(self, site, queries, keys, kwargs):
        text = slice(0, kwargs["encoder_hidden_states"].shape[1])
        image = slice(self.registers + text.stop, queries)
        return Spans(image, text, image, text)


class Transposed(FluxFamily):
    def unpack(self, latents, arguments):
        return super().unpack(latents, arguments).flip(-1)


class OtherLevels(FluxFamily):
    def schedule(self, arguments):
        return {**super().schedule(arguments), "mu": 0.3}


class Exchanged(SD3Family):
    def branches(self, call):
        return super().branches(call)[::-1]


class ShiftedTokens(SD3Family):
    def tokenize(self, prompt, arguments=None):
        return super().tokenize(prompt, arguments).part(slice(1, None))


class RawVariance(PixArtFamily):
    def prediction(self, out, arguments):
        return out[0][:, -4:]


class OtherEncoding(PixArtFamily):
    def encode(self, prompts, arguments=None):
        return super().encode([p.upper() + " photo" for p in prompts], arguments)


class ForgottenSite(SD3Family):
    def attention_sites(self):
        return [AttentionSite(s.name, s.module, "self", s.heads) for s in super().attention_sites()]


class ColumnsFirst(SD3Family):
    def grid(self, arguments):
        return super().grid(arguments)[::-1]


FLUX = {"options": SHORT, "guided": {"true_cfg_scale": 3.0}, "unguided": {}}
PIXART = {"options": {**SHORT, "use_resolution_binning": False}}
MISTAKES = [
    (TextLast, "flux", FLUX, "probabilities"),
    (RegistersAsText, "auraflow", {"options": SHORT}, "text positions"),
    (Transposed, "flux", FLUX, "layout"),
    (OtherLevels, "flux", FLUX, "steps"),
    (Exchanged, "sd3", {"options": SHORT}, "branches"),
    (ShiftedTokens, "sd3", {"options": SHORT}, "text"),
    (RawVariance, "pixart_alpha", PIXART, "branches"),
    (OtherEncoding, "pixart_alpha", PIXART, "text"),
    (ForgottenSite, "sd3", {"options": SHORT}, "probabilities"),
    (ColumnsFirst, "sd3", {"options": SHORT}, "layout"),
]


@pytest.mark.parametrize(("family", "name", "settings", "check"), MISTAKES, ids=lambda v: getattr(v, "__name__", None))
def test_a_mistake_is_found(family, name, settings, check):
    (one,) = check_family(BUILDERS[name], only=[check], family=family, **settings)
    with pytest.raises(Exception) as caught:
        one()
    assert not isinstance(caught.value, (AttributeError, TypeError, NameError)), caught.value


def test_a_changed_image_is_found():
    class Perturbing(PixArtFamily):
        def attention_sites(self):
            with torch.no_grad():
                self.denoiser.proj_out.bias += 1e-3
            return super().attention_sites()

    (one,) = check_family(BUILDERS["pixart_alpha"], only=["image is bit-equal in float32"], family=Perturbing, **PIXART)
    with pytest.raises(AssertionError, match="differs from an unwatched one"):
        one()
