"""Tests of the small project that the example agent works on."""

import tempfile
import unittest
from pathlib import Path

from counting import most_common
from slug import slug, unique_slug


class SlugTest(unittest.TestCase):
    """Titles become names."""

    def test_words_are_joined(self) -> None:
        """Signs and accents go, words stay."""
        assert slug("Crème brûlée, twice!") == "creme-brulee-twice"

    def test_cut_at_a_word(self) -> None:
        """No word is cut in the middle."""
        assert slug("one two three", max_length=8) == "one-two"

    def test_nothing_left(self) -> None:
        """A title of signs alone has a name too."""
        assert slug("???") == "untitled"

    def test_taken_names_are_numbered(self) -> None:
        """The first free number is used."""
        assert unique_slug("A", {"a", "a-2"}) == "a-3"


class CountingTest(unittest.TestCase):
    """Words are counted over files."""

    def test_most_common(self) -> None:
        """Ties are in alphabetical order."""
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder, "first"), Path(folder, "second")
            first.write_text("b a, B!\n", encoding="utf-8")
            second.write_text("a c\n", encoding="utf-8")
            assert most_common([first, second], 2) == [("a", 2), ("b", 2)]


if __name__ == "__main__":
    unittest.main()
