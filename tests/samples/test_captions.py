import pytest

from diffattn.samples.moving_shapes.captions import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT_COUNT,
    SHAPES,
    Scene,
    all_scenes,
    parse_caption,
    split_scenes,
    vocabulary,
)
from diffattn.samples.moving_shapes.text import make_tokenizer, tokenize


def test_every_scene_is_listed_once() -> None:
    scenes = all_scenes()
    count = len(COLOURS) * (len(COLOURS) - 1) * len(SHAPES) * len(DIRECTIONS)
    assert len(scenes) == len(set(scenes)) == count


def test_captions_are_unique_and_can_be_read_back() -> None:
    scenes = all_scenes()
    assert len({scene.caption for scene in scenes}) == len(scenes)
    assert [parse_caption(scene.caption) for scene in scenes] == scenes


def test_held_out_prompts_never_occur_in_training() -> None:
    training, held_out = split_scenes()
    assert len(held_out) == HELD_OUT_COUNT >= 50
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(all_scenes())


def test_split_is_fixed() -> None:
    first, second = split_scenes(), split_scenes()
    assert first == second
    assert first[1][0].caption == "a red circle moving up on a blue background"


def test_every_word_and_colour_pair_is_seen_in_training() -> None:
    training, _ = split_scenes()
    assert {(s.colour, s.background) for s in training} == {
        (s.colour, s.background) for s in all_scenes()
    }
    assert {(s.shape, s.direction) for s in training} == {
        (s.shape, s.direction) for s in all_scenes()
    }


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "the red circle moving left on a blue background",
        "a red circle moving left on a blue background now",
    ],
)
def test_a_sentence_outside_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="cannot read caption"):
        parse_caption(caption)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pink", "circle", "left", "blue"), "unknown colour 'pink'; choose one of red"),
        (("red", "star", "left", "blue"), "unknown shape 'star'; choose one of circle"),
        (("red", "circle", "away", "blue"), "unknown direction 'away'"),
        (("red", "circle", "left", "mauve"), "unknown background 'mauve'"),
        (("red", "circle", "left", "red"), "a red shape cannot be seen on a red background"),
    ],
)
def test_an_impossible_scene_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(*arguments)


def test_tokenizer_gives_each_word_its_own_id() -> None:
    tokenizer = make_tokenizer()
    ids = [tokenizer(word).input_ids for word in vocabulary()]
    assert all(len(word) == 2 and word[1] == tokenizer.eos_token_id for word in ids)
    assert len({word[0] for word in ids}) == len(vocabulary())
    assert tokenizer.unk_token_id not in {word[0] for word in ids}


def test_tokenizer_ignores_case_and_marks_unknown_words() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer("A Red CIRCLE").input_ids == tokenizer("a red circle").input_ids
    assert tokenizer("a mauve circle").input_ids[1] == tokenizer.unk_token_id


def test_short_captions_are_padded_on_the_right() -> None:
    tokenizer = make_tokenizer()
    ids, mask = tokenize(tokenizer, [all_scenes()[0].caption, ""])
    assert ids.shape == (2, 10)
    assert mask.sum(dim=1).tolist() == [10, 1]
    assert ids[1].tolist() == [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 9
