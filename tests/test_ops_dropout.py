"""The random numbers of dropout against published answers of the generator, and their statistics."""

import pytest
import torch

from minilm_fast.ops.dropout import draw_seeds, dropout_factors, philox


# Known answers of Philox4x32-7 as its authors publish them with Random123.
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_known_answers(word: int, expected: tuple[int, ...]) -> None:
    filled = torch.full((3,), word)
    for found, answer in zip(philox((filled,) * 4, (word, word)), expected, strict=True):
        assert found.tolist() == [answer] * 3


@pytest.mark.parametrize("probability", [0.1, 0.5, 1e-6])
def test_share_and_scale(probability: float) -> None:
    factors = dropout_factors(probability, torch.tensor([2**61 + 3]), 200, 333, streams=3)
    share = round(probability * 65536) / 65536
    assert torch.equal(factors.unique()[-1:], torch.tensor([1 / (1 - share)])) and factors.unique().numel() <= 2
    assert (factors == 0).double().mean().item() == pytest.approx(share, abs=5 * (share / factors.numel()) ** 0.5)


def test_an_element_depends_on_its_place_and_the_seed_only() -> None:
    seed = torch.tensor([7])
    whole = dropout_factors(0.5, seed, 20, 300, streams=2)
    assert torch.equal(whole[:1, :5, :130], dropout_factors(0.5, seed, 5, 130))
    other = dropout_factors(0.5, torch.tensor([7 + 2**32]), 20, 300, streams=2)
    for a, b in (
        (whole, other),
        (whole[0], whole[1]),
        (whole[:, 0], whole[:, 1]),
        (whole[..., :150], whole[..., 150:]),
    ):
        assert (a == b).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_seeds_follow_the_generator() -> None:
    torch.manual_seed(3)
    first = draw_seeds(4)
    torch.manual_seed(3)
    assert torch.equal(first, draw_seeds(4)) and first.min() >= 0 and first.unique().numel() == 4


def test_a_probability_that_rounds_to_one_drops_everything() -> None:
    assert not dropout_factors(1 - 2**-20, torch.tensor([1]), 3, 50).any()
