"""The table of peers' words points at keys that exist, and at no key of our own."""

from __future__ import annotations

from tunedock.recipe.words import hint_for, sections, words

KEYS = {f"{section}.{key}".lstrip(".") for section, keys in sections().items() for key in keys}


def test_every_word_points_at_a_key_that_exists() -> None:
    targets = {word.key for entries in words().values() for word in entries if word.key}
    assert not targets - KEYS


def test_every_word_says_something() -> None:
    for name, entries in words().items():
        assert all(word.key or word.note for word in entries), name


def test_a_peers_word_comes_before_a_key_of_another_section() -> None:
    assert "`data.train.0.num_samples`" in hint_for(("max_samples",))


def test_sections_of_lists_and_kinds() -> None:
    assert "num_samples" in sections()["data.train.0"]
    assert sections()["adapter"]["r"] == ("lora",)
    assert sections()["adapter"]["kind"] == ("lora", "full", "freeze")
    assert sections()["objective"]["beta"][:3] == ("dpo", "orpo", "simpo")
    assert sections()["train"]["seed"] == ()


def test_a_name_of_several_sections_lists_them() -> None:
    assert hint_for(("batch_size",)) == "did you mean `train.batch_size` or `eval.batch_size`?"
