"""What a hostile checkpoint would do."""

import os


class Harm:
    """What a checkpoint from somebody else may hold."""

    def __reduce__(self):
        return os.system, ("touch harmed",)
