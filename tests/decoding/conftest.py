from pairs import text, text_inputs, vision, vision_inputs
from rows import exact

__all__ = ["exact", "text", "text_inputs", "vision", "vision_inputs"]  # fixtures
