import dataclasses
import math

import pytest

from config import RECIPES, Config, UserError, flag


def test_the_defaults_are_the_baseline():
    config = Config()
    assert (config.epochs, config.lr, config.min_lr, config.momentum, config.batch_size) == (80, 0.01, 1e-6, 0.9, 128)
    assert RECIPES["baseline"] == {}
    for changes in RECIPES.values():
        Config(**changes)


@pytest.mark.parametrize(("field", "value"), [
    ("lr", -0.1), ("lr", math.nan), ("lr", math.inf), ("momentum", 1.5), ("batch_size", 0), ("epochs", 0),
    ("flip_p", 1.1), ("dropout", 1.0), ("seed", -1), ("validation", -5), ("coarse_dropout_size", 33)])
def test_a_value_out_of_range_is_named_with_its_range(field, value):
    with pytest.raises(UserError) as error:
        Config(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{flag(field)} is {value}")
    metadata = next(f.metadata for f in dataclasses.fields(Config) if f.name == field)
    assert f"{metadata['low']} to {metadata['high']}" in message


@pytest.mark.parametrize(("changes", "words"), [
    ({"epochs": 2.5}, "type int"), ({"epochs": True}, "type int"), ({"nesterov": 1}, "type bool"),
    ({"lr": "0.1"}, "type float"),
    ({"dataset": "imagenet"}, "auto, cifar10, folder, synthetic"), ({"device": "gpu"}, "cuda:N"),
    ({"name": "a/b"}, "letters A to Z, digits"), ({"lr": 1e-7, "min_lr": 1e-6}, "lower --min-lr"),
    ({"nesterov": True, "momentum": 0.0}, "raise --momentum"),
    ({"kernels": "fused", "deterministic": True}, "leave one of them out")])
def test_what_no_range_can_tell_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Config(**changes)


def test_every_field_has_a_meaning_and_every_number_a_range():
    for field in dataclasses.fields(Config):
        assert field.metadata["help"]
        if field.type in (int, float):
            assert field.metadata["low"] < field.metadata["high"]


def test_a_whole_number_is_a_fraction_too():
    assert Config(lr=1).lr == 1
    assert type(Config(lr=1).lr) is float
