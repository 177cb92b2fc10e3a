"""What a parser raises at text that is not what its format writes."""


class Malformed(Exception):
    """The text is no call. Where nothing of the call was told yet, its text is content after all."""
