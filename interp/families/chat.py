"""Prompts within a conversation: language models as text encoders read a template around the prompt."""

from collections.abc import Callable

from interp.errors import InterpError

_MARK = "\N{SYMBOL FOR UNIT SEPARATOR}\N{SYMBOL FOR RECORD SEPARATOR}"


def around(render: Callable[[str], str], prompt: str) -> tuple[str, str, str]:
    """Return what a template writes before the prompt, the prompt as it appears there, and what it writes behind.

    `render` is the template: prompt → the text that is tokenised. It is asked about a mark that no prompt holds, since the
    prompt's own words may be in the template as well.

    Raises:
        InterpError: the template changes the prompt itself, so that its words cannot be found again.

    >>> around(lambda prompt: f"<user>{prompt.strip()}</user>", " a user ")
    ('<user>', 'a user', '</user>')
    """
    prefix, found, suffix = render(_MARK).partition(_MARK)
    whole = render(prompt)
    for text in (prompt, prompt.strip()):
        if found and whole == prefix + text + suffix:
            return prefix, text, suffix
    raise InterpError(
        f"the text encoder's chat template changes the prompt {prompt!r}, so its words cannot be labelled"
    )
