"""MediaWiki markup to the plain text that a reader sees: no templates, tables, references, files, categories or tags.

Syntax: https://www.mediawiki.org/wiki/Help:Formatting and Help:Links. One pass over the brackets resolves templates, links
and tables from the inside out; the rest is line-wise. Not a full parser: what a page computes (parser functions, tables
of data) is left out.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field

# Elements that go with all they hold.
_DROPPED = (
    "ref",
    "math",
    "gallery",
    "timeline",
    "source",
    "syntaxhighlight",
    "score",
    "imagemap",
    "hiero",
    "chem",
    "graph",
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_DROPPED_EMPTY = re.compile(rf"<(?:{'|'.join(_DROPPED)}|references)\b[^<>]*/>", re.IGNORECASE)
_DROPPED_FULL = re.compile(rf"<({'|'.join(_DROPPED)}|references|table)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_BREAK = re.compile(r"<(?:br|hr)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_MAGIC = re.compile(r"__[A-Z]+__")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*(?:\s+([^\]\n]*))?\]")
_HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*\1\s*$")
_EMPHASIS = re.compile(r"'{2,}")

# Sections that list sources and links rather than tell anything.
_APPENDICES = {
    "references", "external links", "see also", "further reading", "notes", "footnotes", "bibliography", "sources",
    "notes and references", "references and notes", "citations", "works cited", "gallery", "related pages",
    "notes and citations", "references and further reading",
}  # fmt: skip
# Link targets that show as something else than text. (A two- or three-letter code is a link to another language.)
_UNSHOWN_LINK = re.compile(r"(?:file|image|media|category|[a-z]{2,3}|be-x-old|simple)\s*:", re.IGNORECASE)
# Stands for a "|" in resolved text, so that the enclosing template does not split there.
_BAR = "\ue000"


def plain_text(markup: str) -> str:
    """The readable text of a page: paragraphs and headings separated by empty lines. Empty for a page of templates."""
    text = _COMMENT.sub("", markup)
    text = _DROPPED_EMPTY.sub("", text)
    text = _DROPPED_FULL.sub("", text)
    text = _resolve_brackets(text).replace(_BAR, "|")
    text = _EXTERNAL.sub(lambda match: match[1] or "", text)
    text = _BREAK.sub("\n", text)
    text = _TAG.sub("", text)
    text = _MAGIC.sub("", text)
    text = _EMPHASIS.sub("", text)
    text = html.unescape(text).replace("\xa0", " ")
    return _tidy(text)


@dataclass
class _Open:
    """A bracket that is not closed yet, and the resolved text since it."""

    bracket: str
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


_BRACKET = re.compile(r"\{\{|\}\}|\[\[|\]\]|(?m:^[ \t:*]*\{\|)|(?m:^[ \t]*\|\})")
_OPENER = {"}}": "{{", "]]": "[[", "|}": "{|"}


def _resolve_brackets(text: str) -> str:
    """Replace templates, links and tables, nested in any way, by what they show."""
    stack = [_Open("")]
    at = 0
    while match := _BRACKET.search(text, at):
        stack[-1].parts.append(text[at : match.start()])
        at, bracket = match.end(), match[0].strip(" \t:*")
        # "|}}" ends a template with an empty last argument; no table ends there.
        if bracket == "|}" and text[at - 1 : at + 1] == "}}" and stack[-1].bracket == "{{":
            stack[-1].parts.append("|")
            at, bracket = at + 1, "}}"
        if bracket in ("{{", "[[", "{|"):
            stack.append(_Open(bracket))
            continue
        opener = _OPENER[bracket]
        if all(item.bracket != opener for item in stack):
            continue  # closes nothing
        while stack[-1].bracket != opener:  # what was left open inside shows its text
            unclosed = stack.pop()
            stack[-1].parts.append(unclosed.text)
        stack[-2].parts.append(_SHOWN[opener](stack.pop().text).replace("|", _BAR))
    stack[-1].parts.append(text[at:])
    return "".join(item.text for item in stack)


def _show_link(content: str) -> str:
    target, *rest = content.split("|")
    target = target.strip()
    if _UNSHOWN_LINK.match(target):
        return ""
    return rest[-1] if rest else target.lstrip(":")


def _show_template(content: str) -> str:
    """What the common templates that stand within a sentence show; nothing for all others."""
    name, *args = content.split("|")
    name = name.strip().lower().replace("_", " ")
    plain = [arg.strip() for arg in args if not re.match(r"\s*[\w -]+\s*=", arg)]
    named = {key.strip(): value.strip() for key, equals, value in (arg.partition("=") for arg in args) if equals}
    first = plain[0] if plain else named.get("1", named.get("text", ""))
    if name in _FIRST_ARGUMENT:
        return first
    if name in ("lang", "transl", "language", "wikt-lang"):
        return plain[-1] if len(plain) > 1 else ""
    if name.startswith("lang-"):
        return first
    if name in ("convert", "cvt"):
        return _show_convert(plain)
    if name in ("quote", "cquote", "blockquote", "quotation", "bquote"):
        return f"\n\n{first}\n\n"
    if name == "as of":
        return f"As of {first}" if "lc" not in named else f"as of {first}"
    if name in ("circa", "c.", "ca."):
        return f"c. {first}".strip()
    if name in ("frac", "fraction", "sfrac"):
        return (
            f"{plain[0]} {plain[1]}/{plain[2]}"
            if len(plain) > 2
            else "/".join(plain if len(plain) > 1 else ["1", first])
        )
    if name in ("chem", "vr", "ce"):
        return "".join(plain)
    if name in ("val", "nts", "formatnum:"):
        return f"{first} {named.get('u', '')}".strip()
    if name in ("nihongo", "flag", "flagcountry", "vanchor", "ill"):
        return first
    return _LITERAL.get(name, "")


_FIRST_ARGUMENT = {
    "small", "smaller", "nowrap", "big", "larger", "abbr", "sc", "smallcaps", "angbr", "ipa", "em", "strong", "keypress",
    "mono", "nobold", "noitalic", "sub", "sup", "native name", "visible anchor", "not a typo", "sic", "linktext", "code",
    "var", "math", "mvar", "longitem", "unicode", "script", "title", "center", "nobr", "dts", "inflation-year",
}  # fmt: skip
_LITERAL = {
    "nbsp": " ", "spaces": " ", "space": " ", "ndash": "–", "–": "–", "mdash": "—", "spaced ndash": " – ", "snd": " – ",
    "'": "'", "'s": "'s", "!": "|", "·": " · ", "•": " • ", "=": "=", "pi": "π", "minus": "−", "times": "×", "dagger": "†",
    "increase": "", "(": "{", ")": "}", "clear": "\n", "-": "\n",
}  # fmt: skip


def _show_convert(plain: list[str]) -> str:
    """`{{convert|5|km|mi}}` shows "5 km (3.1 mi)"; the quantity that the author gave is enough."""
    if len(plain) < 2:
        return " ".join(plain)
    if plain[1] in ("-", "–", "to", "and", "by", "x", "or", "to(-)") and len(plain) > 3:
        joined = f"{plain[0]}–{plain[2]}" if plain[1] in ("-", "–") else f"{plain[0]} {plain[1]} {plain[2]}"
        return f"{joined} {_unit(plain[3])}"
    return f"{plain[0]} {_unit(plain[1])}"


def _unit(code: str) -> str:
    known = {
        "C": "°C",
        "F": "°F",
        "sqmi": "square miles",
        "sqkm": "km²",
        "km2": "km²",
        "m2": "m²",
        "m3": "m³",
        "km3": "km³",
    }
    known |= {"sqft": "square feet", "cuft": "cubic feet", "mi2": "square miles", "kph": "km/h", "impgal": "gallons"}
    return known.get(code, code)


_SHOWN = {"{{": _show_template, "[[": _show_link, "{|": lambda content: ""}


def _tidy(text: str) -> str:
    """Headings, list marks, blanks: one paragraph a line, empty lines between, no heading without text, no appendices."""
    blocks: list[tuple[int, str]] = []  # (heading level, or 0 for text; the line)
    skipped_level = 0
    for raw in text.split("\n"):
        line = _tidy_line(raw)
        heading = _HEADING.match(line)
        if heading:
            level = len(heading[1])
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if heading[2].lower() in _APPENDICES else 0
            if not skipped_level and heading[2]:
                blocks.append((level, heading[2]))
        elif line and not skipped_level:
            blocks.append((0, line))
    kept: list[str] = []
    following = 1  # the level of the block that follows; the end counts as a heading of level 1
    for level, line in reversed(blocks):
        # A heading directly before a heading of its own level or above, or before the end, has nothing to say.
        if level and following and following <= level:
            continue
        kept.append(line)
        following = level
    return "\n\n".join(reversed(kept))


def _tidy_line(line: str) -> str:
    line = re.sub(r"^\s*[*#:;]+\s*", "", line)
    line = re.sub(r"^-{4,}", "", line)
    line = re.sub(r"\s+", " ", line)
    # Brackets that held only a template, and the blanks around what went.
    line = re.sub(r"\(\s*(?:[,;:]\s*)+", "(", line)
    line = re.sub(r"(?:\s*[,;])*\s+\)", ")", line)
    line = re.sub(r"[(\[][\s,;:]*[)\]]", "", line)
    line = re.sub(r"\s+([,.;:])(?=\s|$)", r"\1", line)
    line = re.sub(r" {2,}", " ", line).strip()
    # A line of marks alone is what a template or table left.
    return line if re.search(r"\w", line) else ""
