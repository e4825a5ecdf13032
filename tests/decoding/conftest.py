from pairs import text, text_inputs, vision, vision_inputs

__all__ = ["text", "text_inputs", "vision", "vision_inputs"]  # fixtures
