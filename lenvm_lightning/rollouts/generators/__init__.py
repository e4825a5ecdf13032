"""Who writes completions: a model in this process, or a server."""
