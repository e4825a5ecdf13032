"""Names that stay inside the folder they are meant for."""


def is_plain_name(name: str) -> bool:
    """Whether a name is that of an entry of a folder, and of no other place: no path, nothing unprintable."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")
