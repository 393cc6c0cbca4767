"""Media of interactions: kept once, by content, outside the rows that a conversation reads."""
