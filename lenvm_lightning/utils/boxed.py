r"""The last `\boxed{}` of a text, where models of mathematics put their final answer."""

import re


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{}` holds, braces balanced; empty and unclosed ones do not count."""
    opened: list[int | None] = []  # where the content of a box begins; None for any other brace
    last = None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append(None if token[0] == "{" else token.end())
        elif token[0] == "}" and opened:
            begin = opened.pop()
            content = "" if begin is None else text[begin : token.start()].strip()
            last = content or last
    return last
