"""Where replayed programs come from: readers of recorded sessions, and generators from published statistics."""
