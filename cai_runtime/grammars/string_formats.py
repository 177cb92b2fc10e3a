"""Regular expressions for JSON Schema's string formats. Where a format is hard to say, they allow less than it does, never
more: what they match is valid."""

from __future__ import annotations

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # without 0000, which Python's dates lack
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
# No leap seconds: they are valid at the end of some days in UTC alone.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

_N = "[0-9]{1,9}"
_HOURS = f"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_DURATION = f"P(?:{_N}W|(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)(?:{_HOURS})?|{_HOURS})"

# Labels without two hyphens in a row: such as stand for other scripts in Punycode, which has to be valid.
_LABEL = "[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*"
_SHORT_LABELS = r"[^.]{1,63}(?:\.[^.]{1,63})*"

# At most 62 characters before the @ and 62 a label.
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
_DOMAIN_PART = "[a-zA-Z0-9]{1,20}(?:-[a-zA-Z0-9]{1,20}){0,2}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@{_DOMAIN_PART}(?:\.{_DOMAIN_PART}){{1,2}}"

_BYTE = "(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_H = "[0-9a-fA-F]{1,4}"


def _ipv6() -> str:
    """All eight groups, or "::" for at least one of them. Without IPv4 inside."""
    forms = [f"{_H}(?::{_H}){{7}}", f"::(?:{_H}(?::{_H}){{0,6}})?"]
    for before in range(1, 8):
        after = f"(?:{_H}(?::{_H}){{0,{6 - before}}})?" if before < 7 else ""
        forms.append(f"{_H}(?::{_H}){{{before - 1}}}::{after}")
    return f"(?:{'|'.join(forms)})"


_PERCENT = "%[0-9a-fA-F]{2}"
_CHAR = f"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|{_PERCENT})"
_HOST = f"(?:\\[{_ipv6()}\\]|(?:[a-zA-Z0-9._~!$&'()*+,;=-]|{_PERCENT})*)"
_USER = f"(?:(?:[a-zA-Z0-9._~!$&'()*+,;=:-]|{_PERCENT})*@)?"
_URI = (
    rf"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{_USER}{_HOST}(?::[0-9]{{0,5}})?(?:/{_CHAR}*)*"
    rf"|/?(?:{_CHAR}+(?:/{_CHAR}*)*)?)(?:\?(?:{_CHAR}|[/?])*)?(?:#(?:{_CHAR}|[/?])*)?"
)

# Format -> (what the text must match, each as a whole; most characters or None).
FORMATS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "date": ((_DATE,), None),
    "time": ((_TIME,), None),
    "date-time": ((f"{_DATE}T{_TIME}",), None),
    "duration": ((_DURATION,), None),
    "email": ((_EMAIL,), None),
    "hostname": ((rf"{_LABEL}(?:\.{_LABEL})*", _SHORT_LABELS), 253),
    "ipv4": ((_IPV4,), None),
    "ipv6": ((_ipv6(),), None),
    "uuid": (("[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",), None),
    "uri": ((_URI,), None),
    "json-pointer": (("(?:/(?:[^/~]|~[01])*)*",), None),
}
# These say what a text is for; any text has them.
LABELS = frozenset({"password", "binary", "path", "file-path", "directory-path"})
