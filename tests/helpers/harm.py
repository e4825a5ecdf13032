"""What a hostile checkpoint would do."""

import os


class Harm:
    """What a checkpoint of a stranger may hold."""

    def __reduce__(self):
        return os.system, ("touch harmed",)
