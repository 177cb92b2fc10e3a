"""Whisper's languages: their codes and English names (Radford et al. 2022; the tokenizer has a token for each code)."""

from __future__ import annotations

from collections.abc import Collection

from cai_runtime.api.errors import BadRequestError
from cai_runtime.scalars import shown

LANGUAGES = {
    "en": "english", "zh": "chinese", "de": "german", "es": "spanish", "ru": "russian", "ko": "korean", "fr": "french",
    "ja": "japanese", "pt": "portuguese", "tr": "turkish", "pl": "polish", "ca": "catalan", "nl": "dutch", "ar": "arabic",
    "sv": "swedish", "it": "italian", "id": "indonesian", "hi": "hindi", "fi": "finnish", "vi": "vietnamese",
    "he": "hebrew", "uk": "ukrainian", "el": "greek", "ms": "malay", "cs": "czech", "ro": "romanian", "da": "danish",
    "hu": "hungarian", "ta": "tamil", "no": "norwegian", "th": "thai", "ur": "urdu", "hr": "croatian", "bg": "bulgarian",
    "lt": "lithuanian", "la": "latin", "mi": "maori", "ml": "malayalam", "cy": "welsh", "sk": "slovak", "te": "telugu",
    "fa": "persian", "lv": "latvian", "bn": "bengali", "sr": "serbian", "az": "azerbaijani", "sl": "slovenian",
    "kn": "kannada", "et": "estonian", "mk": "macedonian", "br": "breton", "eu": "basque", "is": "icelandic",
    "hy": "armenian", "ne": "nepali", "mn": "mongolian", "bs": "bosnian", "kk": "kazakh", "sq": "albanian",
    "sw": "swahili", "gl": "galician", "mr": "marathi", "pa": "punjabi", "si": "sinhala", "km": "khmer", "sn": "shona",
    "yo": "yoruba", "so": "somali", "af": "afrikaans", "oc": "occitan", "ka": "georgian", "be": "belarusian",
    "tg": "tajik", "sd": "sindhi", "gu": "gujarati", "am": "amharic", "yi": "yiddish", "lo": "lao", "uz": "uzbek",
    "fo": "faroese", "ht": "haitian creole", "ps": "pashto", "tk": "turkmen", "nn": "nynorsk", "mt": "maltese",
    "sa": "sanskrit", "lb": "luxembourgish", "my": "myanmar", "bo": "tibetan", "tl": "tagalog", "mg": "malagasy",
    "as": "assamese", "tt": "tatar", "haw": "hawaiian", "ln": "lingala", "ha": "hausa", "ba": "bashkir",
    "jw": "javanese", "su": "sundanese", "yue": "cantonese",
}  # fmt: skip
# Other names and codes of the same.
_ALIASES = {
    "burmese": "my", "valencian": "ca", "flemish": "nl", "haitian": "ht", "letzeburgesch": "lb", "pushto": "ps",
    "panjabi": "pa", "moldavian": "ro", "moldovan": "ro", "sinhalese": "si", "castilian": "es", "mandarin": "zh",
    "farsi": "fa", "jv": "jw", "iw": "he", "nb": "no", "fil": "tl",
}  # fmt: skip
_CODES = {name: code for code, name in LANGUAGES.items()} | _ALIASES
AUTO = "auto"


def language_code(given: str, param: str) -> str:
    """The code of a language: of a code or a name, either with a region ("de-AT", "pt_BR").

    Raises:
        BadRequestError: there is no such language; `param` is the parameter that named it.
    """
    word = given.strip().lower()
    base = word.replace("_", "-").partition("-")[0]
    for each in (word, base):
        if each in LANGUAGES:
            return each
        if each in _CODES:
            return _CODES[each]
    raise _wrong(param, f"must be a language's code or name, got {shown(given)}. There are {_listed(LANGUAGES)}")


def language_of(given: str | None, model: str, known: Collection[str]) -> str | None:
    """The code that a request's `language` stands for in a model; None: it is to be detected.

    Args:
        given: a code, a name, "auto", or None.
        model: its name, for errors.
        known: the codes that it has tokens for; empty: it knows English alone.

    Raises:
        BadRequestError: the model does not know this language.
    """
    if given is None or given.strip().lower() == AUTO:
        return None if known else "en"
    code = language_code(given, "language")
    if code in (known or ("en",)):
        return code
    if not known:
        raise _wrong(
            "language", f"the model {shown(model)} knows English alone, got {shown(given)}: use a multilingual one"
        )
    raise _wrong(
        "language", f"the model {shown(model)} does not know {shown(given)}. It knows {_listed(sorted(known))}"
    )


def _listed(codes: Collection[str]) -> str:
    return ", ".join(f"{code} ({LANGUAGES.get(code, code)})" for code in codes)


def _wrong(param: str, problem: str) -> BadRequestError:
    return BadRequestError(f"Invalid '{param}': {problem}.", param=param, code="invalid_value")
