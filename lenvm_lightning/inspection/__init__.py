"""What a length value model thinks at every token of a text: data first, then a page to look at."""
